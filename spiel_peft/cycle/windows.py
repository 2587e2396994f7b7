"""Accumulation windows at an optimizer step: what the step's backward passes gathered is scaled and added up.

One process opens a window in its first backward pass (`spiel_peft.cycle.collector`). Several ranks cannot: a collective
inside a backward pass hangs as soon as two ranks run theirs in another order. They agree at the end of a step instead:

- In the step before a window every rank notes the positions of its k largest gradients, found in the step's first
  backward pass. At its end the ranks exchange them. The union is the shortlist: its best 2k where it has more.
- In the window's first step every rank gathers its gradient at the whole shortlist. Summed over ranks, these are the
  gradients of one process with all the data; the k largest sums stay candidates.

Where there is no step before (at the start of a run, or with windows one after the other) the first step of the window
is also the one of the proposals, and counts with what the ranks proposed.
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from spiel_kernels.fold import accumulation_dtype

from ..delta import SparseDelta
from ..training_state import CandidateWindow
from .candidates import NO_POSITION, best_slots, padded, shortlist, unite
from .collector import common_probe, drop_step, gathers_at, proposes_at
from .data_parallel import ranks_of
from .ranks import Ranks, in_buckets
from .step_gradients import gradient_at_probes


def commit_windows(deltas: list[SparseDelta], ranks: Ranks | None) -> None:
    """Add the finished step's candidate gradients to the open windows, scaled and clipped as the active ones were.

    Args:
        deltas: of one adapter, before the step is counted.
        ranks: with whom the step was taken; the contributions of all of them are added up.
    """
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
            continue
        window = delta.state.window
        if delta in finite:
            step_gradient = _step_gradient(delta, factors[delta])
            if window.shared and window.steps == 0:
                window.sums, window.squares = step_gradient, step_gradient.square()
            else:
                window.sums += step_gradient
                window.squares += step_gradient.square_()
        window.steps += 1
        if delta not in opened:
            narrow(delta)


def narrow(delta: SparseDelta) -> None:
    """Reduce a shortlist to as many candidates as there are deltas, those with the largest sums."""
    window = delta.state.window
    if window is None or window.positions.numel() <= delta.k:
        return
    best = best_slots(window.sums.abs(), delta.k)
    window.positions, window.sums, window.squares = window.positions[best], window.sums[best], window.squares[best]


def _finite(gathered: list[SparseDelta], factors: dict[SparseDelta, Tensor]) -> dict[SparseDelta, bool]:
    if not gathered:
        return {}
    # Candidates can overflow where no active delta does; the trainer then sees no reason to skip the step. One wait
    # for the device tells for all of them.
    device = gathered[0].values.device
    sums = torch.stack([_step_gradient(d, factors[d]).sum(dtype=torch.float64).to(device) for d in gathered])
    return dict(zip(gathered, torch.isfinite(sums).tolist(), strict=True))


def _step_gradient(delta: SparseDelta, factor: Tensor) -> Tensor:
    pending = delta.state.current.pending
    return pending * factor.to(pending.dtype)


def _scalings(deltas: list[SparseDelta], default: float) -> dict[SparseDelta, Tensor]:
    """What unscaling, averaging and clipping made of each gathering delta's raw gradients: ``grad`` over the probes.

    Optimizers that unscale inside their kernel write the result back, so this holds for them too. A matrix whose
    probes are all zero (an embedding whose active rows did not occur) takes the factor of the others; `default` if
    there is none.
    """
    products: dict[SparseDelta, tuple[Tensor, Tensor]] = {}
    for delta in deltas:
        seen = gradient_at_probes(delta)
        if seen is not None:
            raw = delta.state.current.probe_sums.double()
            products[delta] = (seen.double() * raw).sum(), (raw * raw).sum()
    if not products:
        return {}
    device = deltas[0].values.device
    seen_total = torch.stack([seen.to(device) for seen, _ in products.values()]).sum()
    raw_total = torch.stack([raw.to(device) for _, raw in products.values()]).sum()
    overall = torch.where(raw_total > 0, seen_total / raw_total, torch.full_like(raw_total, default))
    return {delta: torch.where(raw > 0, seen / raw, overall.to(raw.device)) for delta, (seen, raw) in products.items()}


# Several ranks


def ready_probes(deltas: list[SparseDelta]) -> None:
    """Called before a step: have probes even where this rank's data did not reach a layer; others' may have."""
    for delta in deltas:
        current, step = delta.state.current, delta.state.step
        gathers = delta.state.window is not None or proposes_at(delta, step)
        if current.probe is None and gathers and ranks_of(delta) is not None:
            current.probe = common_probe(delta)
            current.probe_sums = torch.zeros(
                current.probe.numel(), dtype=accumulation_dtype(delta.values), device=delta.values.device
            )


def _add_up(deltas: list[SparseDelta], ranks: Ranks) -> None:
    """Turn this rank's raw gradients at the common candidates, and at the probes, into the sums over all ranks.

    `values.grad` is averaged already, so only probes that are sums as well tell the factor.
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
    """Exchange proposals and open the windows of those deltas that got any; their `pending` becomes what was said."""
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
    # Takes no memory until a step has counted.
    zeros = torch.zeros((), dtype=sums.dtype, device=sums.device).expand(union.numel())
    delta.state.window = CandidateWindow(union.to(delta.indices.dtype), zeros, zeros, shared=True)
    delta.state.current.pending = sums
