"""Accumulation windows: choose the candidates, alone or with other ranks, and sum their gradients until the close."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor

from spiel_kernels import Largest, stable_topk
from spiel_kernels.dispatch import on_host
from spiel_kernels.fold import accumulation_dtype
from spiel_kernels.outer_plan import known_plan, plan_together

from ..delta import SparseDelta, WeightGradient
from ..growth import get_growth_criterion
from ..state import CandidateWindow, StepGradient
from .agreement import Ranks, in_buckets
from .close import in_window, is_skipped, next_close, regrow_rate
from .exchange import joinable
from .parallel import is_chosen, queue_average, ranks_of, refuse_deepspeed
from .resume import seek
from .steps import gradient_at_probes

# Candidates that several ranks choose together: every rank proposes the positions of its own largest gradients, and the
# score of a position is the sum of the gradients that were proposed with it.


NO_POSITION = -1
# Length of a shortlist as a multiple of k: two ranks can propose no more.
SHORTLIST = 2


def padded(tensor: Tensor, size: int, filler: int = 0) -> Tensor:
    """A one-dimensional tensor at length `size`."""
    return torch.cat([tensor, tensor.new_full((size - tensor.numel(),), filler)])


def unite(positions: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """The union of all proposals and the sums of the gradients that came with them.

    A rank that did not propose a position counts as zero there: its gradient is smaller than its k largest ones.

    Args:
        positions: integer ``[ranks, c]``, distinct within a rank, `NO_POSITION` where it had no more to propose.
        gradients: floating ``[ranks, c]``.

    Returns:
        Sorted positions ``[u]`` and sums ``[u]``, the same bits wherever they are computed: ranks are added in order.
    """
    union = torch.unique(positions[positions != NO_POSITION])
    sums = torch.zeros(union.numel(), dtype=gradients.dtype, device=gradients.device)
    for of_rank, values in zip(positions, gradients, strict=True):
        proposed = of_rank != NO_POSITION
        sums[torch.searchsorted(union, of_rank[proposed])] += values[proposed]
    return union, sums


def shortlist(union: Tensor, sums: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best positions of a union by absolute sum, with their sums: at most `SHORTLIST` times k."""
    if union.numel() <= SHORTLIST * k:
        return union, sums
    best = stable_topk(sums.abs(), SHORTLIST * k)
    return union[best], sums[best]


# Windows at an optimizer step: the gradients that its backward passes gathered are scaled and added up.
#
# A single process opens a window in its first backward pass. Several ranks cannot, because a collective inside a
# backward pass hangs as soon as two ranks run theirs in different orders. They agree at the end of a step instead:
#
# - In the step before a window every rank notes the positions of its k largest gradients, found in the step's first
#   backward pass. At its end the ranks exchange them. The union is the shortlist: its best 2k where it has more.
# - In the window's first step every rank gathers its gradient at the whole shortlist. Summed over ranks, these are the
#   gradients of one process with all the data; the k largest sums stay candidates.
#
# Where no step is left before the window (at the start of a run, or with windows one after the other), the ranks
# propose in its first step, and that step counts with the proposed gradients.


def commit_windows(deltas: list[SparseDelta], ranks: Ranks | None) -> None:
    """Add the finished step's candidate gradients to the open windows, scaled and clipped as the active ones were.

    Args:
        deltas: of one adapter, before the step is counted.
        ranks: the ranks that took the step, whose contributions are added up; None: this process alone.
    """
    settle(deltas)
    opened: list[SparseDelta] = []
    if ranks is not None:
        _add_up(deltas, ranks)
        opened = _open_windows([delta for delta in deltas if proposes_at(delta, delta.state.step)], ranks)
    early = {delta for delta in opened if not gathers_at(delta, delta.state.step)}
    windowed = [delta for delta in deltas if delta.state.window is not None and delta not in early]
    factors = _scalings(deltas, 1.0 if ranks is None else 1.0 / ranks.size)
    gathered = [d for d in windowed if d.state.current.pending is not None and d in factors]
    finite = _finite(gathered, factors)
    for delta in windowed:
        if finite.get(delta) is False:
            drop_step(delta)
            if delta in opened:
                delta.state.window = None
    windowed = [delta for delta in windowed if finite.get(delta) is not False]
    for group in joinable([delta for delta in windowed if delta in finite]):
        _add_step(group, [_step_gradient(delta, factors[delta]) for delta in group])
    for delta in windowed:
        delta.state.window.steps += 1
        if delta not in opened:
            narrow(delta)


def _add_step(deltas: list[SparseDelta], gradients: list[Tensor]) -> None:
    """Add a step's gradients at the candidates to the windows."""
    squares = torch._foreach_mul(gradients, gradients)
    later = [n for n, delta in enumerate(deltas) if delta.state.window.steps]
    for number, delta in enumerate(deltas):
        if not delta.state.window.steps:
            delta.state.window.sums, delta.state.window.squares = gradients[number], squares[number]
    if later:
        windows = [deltas[n].state.window for n in later]
        torch._foreach_add_([window.sums for window in windows], [gradients[n] for n in later])
        torch._foreach_add_([window.squares for window in windows], [squares[n] for n in later])


def settle(deltas: Sequence[SparseDelta]) -> None:
    """Learn what the device found when it chose candidates, with one wait for all matrices.

    Where it found none, or a sample misled it, no window is open, and the next backward pass chooses.
    """
    unsettled = [delta for delta in deltas if delta.state.current.found is not None]
    if not unsettled:
        return
    device = unsettled[0].values.device
    table = torch.stack([delta.state.current.found.to(device) for delta in unsettled]).tolist()
    for delta, (count, sound) in zip(unsettled, table, strict=True):
        state, current = delta.state, delta.state.current
        current.found = None
        state.misled = not sound
        if not (count and sound):
            current.proposed = current.pending = current.opening = None
            if state.window is not None and not state.window.steps and not state.window.shared:
                state.window = None
            continue
        if current.pending is not None:
            current.pending = current.pending[:count]
        if current.proposed is not None:
            current.proposed = current.proposed[:count]
        elif state.window is not None:
            window = state.window
            window.positions, window.sums, window.squares = (
                tensor[:count] for tensor in (window.positions, window.sums, window.squares)
            )


def narrow(delta: SparseDelta) -> None:
    """Reduce a shortlist to the k candidates with the largest absolute sums."""
    window = delta.state.window
    if window is None or window.positions.numel() <= delta.k:
        return
    best = stable_topk(window.sums.abs(), delta.k)
    window.positions, window.sums, window.squares = window.positions[best], window.sums[best], window.squares[best]


def _finite(gathered: list[SparseDelta], factors: dict[SparseDelta, Tensor]) -> dict[SparseDelta, bool]:
    if not gathered:
        return {}
    # The gradients of candidates can overflow where no active delta's does, and then the trainer does not skip the
    # step. One wait for the device answers for all matrices.
    device = gathered[0].values.device
    sums = torch.stack([_step_gradient(d, factors[d]).sum(dtype=torch.float64).to(device) for d in gathered])
    return dict(zip(gathered, torch.isfinite(sums).tolist(), strict=True))


def _step_gradient(delta: SparseDelta, factor: Tensor) -> Tensor:
    return delta.state.current.pending * factor


def _scalings(deltas: list[SparseDelta], default: float) -> dict[SparseDelta, Tensor]:
    """The factor by which unscaling, averaging and clipping changed each delta's raw gradients.

    It is ``values.grad`` at the probes over the raw gradient there. Optimizers that unscale inside their kernel write
    the result back, so it holds for them too. A matrix whose probes are all zero (an embedding whose active rows did
    not occur) takes the factor of the others, or `default` if there are none.
    """
    alike: dict[tuple[torch.device, torch.Size, torch.dtype], list[tuple[SparseDelta, Tensor, Tensor]]] = {}
    for delta in deltas:
        seen = gradient_at_probes(delta)
        if seen is not None:
            raw = delta.state.current.probe_sums
            alike.setdefault((seen.device, seen.shape, raw.dtype), []).append((delta, seen, raw))
    if not alike:
        return {}
    products: list[tuple[list[SparseDelta], Tensor, Tensor]] = []
    for group in alike.values():
        owners, seen, raw = zip(*group, strict=True)
        at_step, before = torch.stack(seen).double(), torch.stack(raw).double()
        products.append((list(owners), (at_step * before).sum(1), (before * before).sum(1)))
    device = deltas[0].values.device
    seen_total = torch.stack([seen.sum().to(device) for _, seen, _ in products]).sum()
    raw_total = torch.stack([raw.sum().to(device) for _, _, raw in products]).sum()
    overall = torch.where(raw_total > 0, seen_total / raw_total, torch.full_like(raw_total, default))
    return {
        delta: factor
        for owners, seen, raw in products
        for delta, factor in _factors(owners, torch.where(raw > 0, seen / raw, overall.to(raw.device)))
    }


def _factors(deltas: list[SparseDelta], factors: Tensor) -> Iterable[tuple[SparseDelta, Tensor]]:
    """Each delta with its factor of ``[n]``, in the dtype of the gradients that it scales."""
    return zip(deltas, factors.to(accumulation_dtype(deltas[0].values)).unbind(), strict=True)


def ready_probes(deltas: list[SparseDelta]) -> None:
    """Before a step, make probes for layers that this rank's data did not reach, as other ranks' may have."""
    for delta in deltas:
        current, step = delta.state.current, delta.state.step
        gathers = delta.state.window is not None or proposes_at(delta, step)
        if current.probe is None and gathers and ranks_of(delta) is not None:
            current.probe = common_probe(delta)
            current.probe_sums = torch.zeros(
                current.probe.numel(), dtype=accumulation_dtype(delta.values), device=delta.values.device
            )


def _add_up(deltas: list[SparseDelta], ranks: Ranks) -> None:
    """Replace this rank's raw gradients at the common candidates and at the probes by their sums over all ranks.

    `values.grad` is an average over the ranks already, so the probes have to be sums over them too.
    """
    tensors: list[Tensor] = []
    for delta in deltas:
        current, window = delta.state.current, delta.state.window
        if window is None and not (proposes_at(delta, delta.state.step) and gathers_at(delta, delta.state.step)):
            continue
        tensors.append(current.probe_sums)
        if window is not None:
            if current.pending is None:
                current.pending = torch.zeros(window.sums.shape, dtype=window.sums.dtype, device=window.sums.device)
            tensors.append(current.pending)
    ranks.add_up(tensors)


def _open_windows(deltas: list[SparseDelta], ranks: Ranks) -> list[SparseDelta]:
    """Exchange proposals and open a window for each delta that got any; sets `pending` to its gradients."""
    opened, rest = [], iter(deltas)
    for bucket in in_buckets([delta.indices for delta in deltas]):
        together = list(islice(rest, len(bucket)))
        sizes = [delta.k for delta in together]
        mine = [_proposal(delta) for delta in together]
        positions = ranks.gather(torch.cat([proposed for proposed, _ in mine])).split(sizes, dim=1)
        gradients = ranks.gather(torch.cat([gathered for _, gathered in mine])).split(sizes, dim=1)
        for delta, proposed, gathered in zip(together, positions, gradients, strict=True):
            union, sums = unite(proposed, gathered)
            # As in one process, gradients that overflowed choose nothing, and the next step chooses anew.
            if union.numel() and bool(torch.isfinite(sums).all()):
                _open_window(delta, union, sums)
                opened.append(delta)
    return opened


def _proposal(delta: SparseDelta) -> tuple[Tensor, Tensor]:
    """This rank's proposed positions and its gradient there, ``[k]`` both."""
    current = delta.state.current
    if current.proposed is None or current.pending is None:
        positions = delta.indices[:0]
        gradients = torch.zeros(0, dtype=accumulation_dtype(delta.values), device=delta.values.device)
    else:
        positions, gradients = current.proposed, current.pending
    return padded(positions, delta.k, NO_POSITION), padded(gradients, delta.k)


def _open_window(delta: SparseDelta, union: Tensor, sums: Tensor) -> None:
    union, sums = shortlist(union, sums, delta.k)
    # An expanded zero takes no memory until a step has counted.
    zeros = torch.zeros((), dtype=sums.dtype, device=sums.device).expand(union.numel())
    delta.state.window = CandidateWindow(union.to(delta.indices.dtype), zeros, zeros, shared=True)
    delta.state.current.pending = sums


_PROBES = 16
_COMMON_PROBES = 256


class WindowCollector:
    """Chooses the candidates of a window and collects their gradients (a `spiel_peft.delta.Collector`)."""

    def expect(self, delta: SparseDelta, dtype: torch.dtype) -> None:
        """Settle what the last backward pass has left to the device, and plan the gathers that have no plan yet.

        One layer does this for all deltas of its adapter on its device, so that they wait together.
        """
        if delta.state.current.found is not None:
            settle(_neighbours(delta))
        if any(known_plan(*matrix, dtype) is None for matrix in _gathered(delta)):
            plan_together([matrix for other in _neighbours(delta) for matrix in _gathered(other)], dtype)

    def prepare(self, delta: SparseDelta, gradient: WeightGradient) -> None:
        """Take up loaded training state, refuse DeepSpeed's ZeRO, and choose candidates where they are due."""
        if not delta.state.sought:
            seek(delta)
        refuse_deepspeed(delta, is_chosen(delta))
        queue_average(delta)
        _note_accumulation(delta)
        if delta.state.window is None:
            if ranks_of(delta) is not None:
                _propose(delta, gradient)
            elif gathers_at(delta, delta.state.step):
                _open_own_window(delta, gradient)

    def wanted(self, delta: SparseDelta) -> Tensor | None:
        """The candidates ``[c]`` of the open window; before several ranks open one, those that this rank proposes."""
        state = delta.state
        if state.current.opening is not None:
            return None  # known from the search for candidates
        if state.window is None:
            return state.current.proposed
        return state.window.positions if gathers_at(delta, state.step) else None

    def collect(self, delta: SparseDelta, active: Tensor, candidates: Tensor | None) -> None:
        """Add what was gathered: at the active positions ``[k]`` and at the candidates ``[c]``, if there are any."""
        current = delta.state.current
        if current.opening is not None:
            candidates, current.opening = current.opening, None
        if candidates is None:
            return
        if current.probe is None or current.probe_sums is None:
            if ranks_of(delta) is not None:
                current.probe = common_probe(delta)
            else:
                current.probe = torch.topk(active.abs(), min(_PROBES, delta.k)).indices
            current.probe_sums = active[current.probe]
        else:
            current.probe_sums += active[current.probe]
        if current.pending is None:
            current.pending = candidates
        else:
            current.pending += candidates


def _open_own_window(delta: SparseDelta, gradient: WeightGradient) -> None:
    """Open the window of a process that trains alone, at the largest entries of the first gradient that has any.

    An expert without tokens and a batch without labels have none: the next backward pass chooses then.
    """
    largest = _largest(delta, gradient)
    if largest.positions.numel():
        # An expanded zero takes no memory until a step has counted.
        zeros = torch.zeros((), dtype=accumulation_dtype(delta.values), device=delta.values.device)
        zeros = zeros.expand(largest.positions.numel())
        delta.state.window = CandidateWindow(largest.positions.to(delta.indices.dtype), zeros, zeros)
        delta.state.current.found, delta.state.current.opening = largest.found, largest.values


def _largest(delta: SparseDelta, gradient: WeightGradient) -> Largest:
    """The candidates; the search waits for the device if a sample has misled the last one."""
    wait, delta.state.misled = delta.state.misled, False
    return gradient.largest(candidate_count(delta), wait)


def _propose(delta: SparseDelta, gradient: WeightGradient) -> None:
    """Choose the positions that this rank proposes as candidates, in the first backward pass of the step."""
    current = delta.state.current
    if current.proposed is None and proposes_at(delta, delta.state.step):
        largest = _largest(delta, gradient)
        if largest.positions.numel():
            current.proposed = largest.positions.to(delta.indices.dtype)
            current.found, current.opening = largest.found, largest.values


def candidate_count(delta: SparseDelta) -> int:
    """How many candidates a window of this delta chooses; at most k.

    The rate of its close is known in advance where the length of the run is. Where it follows the learning rate, no
    close takes more than the initial rate. (Several ranks propose so many each, and reduce the union to k.)
    """
    state, run, config = delta.state, delta.run, delta.run.config
    per_grown = config.candidates
    if per_grown is None:
        per_grown = get_growth_criterion(config.growth).candidates_per_grown
    # Whether the first close replaces all deltas is known only after the first step.
    if per_grown is None or (state.closes == 0 and state.fresh is not False):
        return delta.k
    rate = config.initial_regrow_rate
    if run.total_steps is not None:
        close = next_close(state.step, config.regrow_every, config.accumulation_steps)
        rate = regrow_rate(config.regrow_schedule, rate, close, run.total_steps)
    return min(delta.k, math.ceil(per_grown * math.floor(rate * delta.k)))


def _neighbours(delta: SparseDelta) -> list[SparseDelta]:
    """The deltas of linear layers that belong to the same adapter and are on the same device."""
    device = delta.values.device
    return [d for d in delta.run.deltas() if len(d.weight_shape) == 2 and d.values.device == device]


def _gathered(delta: SparseDelta) -> list[tuple[Tensor, int, int]]:
    """The index sets at which backward passes gather, with rows and columns of the matrix."""
    matrices = [(delta.indices, delta.rows, delta.cols)]
    if delta.state.window is not None:
        matrices.append((delta.state.window.positions, delta.rows, delta.cols))
    return matrices


def common_probe(delta: SparseDelta) -> Tensor:
    """Slots of some active deltas, the same on every rank, whatever gradients it has."""
    count = min(_COMMON_PROBES, delta.k)
    return torch.arange(count, device=delta.values.device) * delta.k // count


def gathers_at(delta: SparseDelta, done: int) -> bool:
    """Whether the step after `done` finished ones belongs to an accumulation window."""
    run, config = delta.run, delta.run.config
    if delta.state.finished and done == delta.state.total_steps:
        done = 0  # if anything follows, it is the first step of another run
    if not get_growth_criterion(config.growth).gathers:
        return False
    return _is_gathering_step(
        done, config.regrow_every, config.accumulation_steps, run.total_steps, config.stop_regrowing_at
    )


@functools.lru_cache(maxsize=64)  # every delta asks in every backward pass
def _is_gathering_step(
    done: int, regrow_every: int, accumulation_steps: int, total_steps: int | None, stop_regrowing_at: float
) -> bool:
    if not in_window(done, regrow_every, accumulation_steps):
        return False
    return not is_skipped(next_close(done, regrow_every, accumulation_steps), total_steps, stop_regrowing_at)


def proposes_at(delta: SparseDelta, done: int) -> bool:
    """Whether, among several ranks, the step after `done` finished ones is one to propose candidates in.

    That is the step before a window or, where that belongs to another window or there is none, one in the window.
    """
    return delta.state.window is None and (gathers_at(delta, done) or gathers_at(delta, done + 1))


def _note_accumulation(delta: SparseDelta) -> None:
    """Drop what was collected for a step whose gradients were cleared without an optimizer step."""
    state, current = delta.state, delta.state.current
    task = torch._C._current_graph_task_id()
    if task == current.graph_task:
        return
    grad = delta.values.grad
    cleared = grad is None
    if grad is not None and current.probe is not None and current.probe_sums is not None:
        # zero_grad(set_to_none=False) leaves zeros behind.
        zeroed = (grad[current.probe] == 0).all() & (current.probe_sums != 0).any()
        if on_host(zeroed):
            cleared = bool(zeroed)
        else:
            # Without waiting. A window that was opened by what is dropped stays, at the same candidates.
            current.probe_sums = current.probe_sums.masked_fill(zeroed, 0.0)
            if current.pending is not None:
                current.pending = current.pending.masked_fill(zeroed, 0.0)
    if cleared:
        drop_step(delta)
        state.unheld_steps += 1
        if state.unheld_steps == delta.run.config.regrow_every + 1:
            _warn_unheld(delta)
    state.current.graph_task = task


def drop_step(delta: SparseDelta) -> None:
    """Forget the step in progress; a window that it has opened is closed, so that the next step chooses candidates."""
    delta.state.current = StepGradient()
    window = delta.state.window
    if window is not None and window.steps == 0 and not window.shared:
        delta.state.window = None


def _warn_unheld(delta: SparseDelta) -> None:
    if delta.run.record.warned_unheld:
        return
    delta.run.record.warned_unheld = True
    warnings.warn(
        f"The deltas of adapter {delta.run.adapter_name!r} have been given gradients for a whole cycle "
        f"({delta.run.config.regrow_every} accumulations) while no torch.optim.Optimizer stepped them: the cycle does "
        "not run. Pass the model's trainable parameters to the optimizer after get_peft_model.",
        stacklevel=2,
    )
