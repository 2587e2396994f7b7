"""A close: when it is due, what share of the deltas it replaces, what the growth criterion says, and its report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spiel_kernels import sorted_order
from spiel_kernels.index_set import seeded_generator

from ..adapter_format import not_finite
from ..checks import listed
from ..delta import SparseDelta
from ..growth import BUILT_IN, GrowthCriterion, GrowthRequest, PruneRequest
from .exchange import NO_POSITION, Joined, joinable

# Schedule. Steps are optimizer steps of one run, counted from 1. With S = regrow_every and g = accumulation_steps the
# closes are at g, S + g, 2 S + g, ... (Ansell et al., 2024, section 3.2, where micro-batches are counted).


def closes_at(step: int, regrow_every: int, accumulation_steps: int) -> bool:
    """Whether a cycle closes after optimizer step `step` (counted from 1)."""
    return step >= accumulation_steps and (step - accumulation_steps) % regrow_every == 0


def next_close(steps_done: int, regrow_every: int, accumulation_steps: int) -> int:
    """The first close after `steps_done` finished steps."""
    if steps_done < accumulation_steps:
        return accumulation_steps
    cycles = (steps_done - accumulation_steps) // regrow_every + 1
    return accumulation_steps + cycles * regrow_every


def in_window(steps_done: int, regrow_every: int, accumulation_steps: int) -> bool:
    """Whether the step after `steps_done` finished ones is one of the last `accumulation_steps` before a close."""
    return next_close(steps_done, regrow_every, accumulation_steps) - steps_done <= accumulation_steps


def is_skipped(step: int, total_steps: int | None, stop_regrowing_at: float) -> bool:
    """Whether a close at `step` comes too late in the run to take place."""
    # A quotient: 0.29 * 100 is less than 29.
    return total_steps is not None and step / total_steps > stop_regrowing_at


def regrow_rate(schedule: str, initial: float, step: int, total_steps: int) -> float:
    """Share of the deltas that a close at `step` replaces.

    linear: ``initial * (1 - t / T)``; cosine: ``initial * (1 + cos(pi t / T)) / 2``; constant: ``initial``. Past the
    end of the run the schedule stays where it ended.
    """
    progress = min(1.0, step / total_steps)
    if schedule == "linear":
        return initial * (1.0 - progress)
    if schedule == "cosine":
        return initial * (1.0 + math.cos(math.pi * progress)) / 2.0
    return initial


def lr_following_rate(initial: float, lr: float, max_lr: float) -> float:
    """The rate where the length of the run is not known: proportional to the learning rate."""
    return initial * lr / max_lr if max_lr > 0 else initial


# Questions to a growth criterion, with checks of its answers


def propose(criterion: GrowthCriterion, delta: SparseDelta, count: int) -> Tensor:
    """The positions that the criterion proposes to grow: distinct, in range, best first; -1 stands for none.

    Only a criterion that a user has registered is checked, as a check waits for the device.

    Raises:
        ValueError: the criterion, which a user may have registered, proposes something else.
    """
    if criterion.propose is None or count == 0:
        return delta.indices[:0].to(torch.int64)
    proposed = criterion.propose(_request(criterion, delta, count))
    problem = None if criterion.propose in BUILT_IN else _problem_with(proposed, delta.numel)
    if problem is not None:
        raise ValueError(
            f"growth criterion {criterion.name!r} must propose distinct positions in [0, {delta.numel}) as a "
            f"one-dimensional integer tensor (-1 for no position); for {delta.module_name!r} it proposed {problem}"
        )
    return proposed.to(delta.indices.device)


def prune_scores(criterion: GrowthCriterion, deltas: Sequence[SparseDelta], counts: Sequence[int]) -> list[Tensor]:
    """The criterion's prune scores ``[k]`` of some deltas; those with the lowest scores are pruned first.

    Args:
        deltas: that close together, see `joinable`.
        counts: how many of each are to be pruned at most.

    Raises:
        ValueError: the criterion's own score is no floating tensor of that shape, or has NaN.
    """
    if criterion.prune_score is None:
        entries = Joined([delta.k for delta in deltas], deltas[0].values.device)
        return entries.split(entries.join([delta.values.detach() for delta in deltas]).abs())
    return [_own_scores(criterion, delta, count) for delta, count in zip(deltas, counts, strict=True)]


def _own_scores(criterion: GrowthCriterion, delta: SparseDelta, count: int) -> Tensor:
    values = delta.values.detach()
    gradient = delta.values.grad
    request = PruneRequest(
        module_name=delta.module_name,
        indices=delta.indices.to(torch.int64),
        values=values.clone(),
        gradient=None if gradient is None else gradient.detach().clone(),
        count=count,
    )
    scores = criterion.prune_score(request)
    if not isinstance(scores, Tensor):
        problem = f"a {type(scores).__name__}"
    elif scores.shape != values.shape or not scores.is_floating_point():
        problem = f"a {scores.dtype} tensor of shape {tuple(scores.shape)}"
    elif bool(scores.isnan().any()):
        problem = f"{int(scores.isnan().sum())} scores that are NaN"
    else:
        return scores.detach().to(values.device)
    raise ValueError(
        f"`prune_score` of growth criterion {criterion.name!r} must return one floating score per delta, without NaN; "
        f"for the {delta.k} deltas of {delta.module_name!r} it returned {problem}"
    )


def refuse_ruined(deltas: list[SparseDelta]) -> None:
    """Raise a FloatingPointError that names the modules whose deltas are NaN or infinite, if there are any."""
    device = deltas[0].values.device
    sums = [torch.cat([d.values.detach() for d in group]).sum(dtype=torch.float64) for group in joinable(deltas)]
    if not bool(torch.isfinite(torch.stack([total.to(device) for total in sums])).all()):
        names = not_finite({delta.module_name: delta.values for delta in deltas})
        raise FloatingPointError(
            f"Adapter {deltas[0].run.adapter_name!r}: an optimizer step has made deltas of {len(names)} of "
            f"{len(deltas)} modules NaN or infinite ({listed(names)}): its gradients were not finite, or the learning "
            "rate is too high. They cannot be repaired, and saving refuses them: resume from the last checkpoint, with "
            "a lower learning rate or without the batch that caused it."
        )


def accumulators(delta: SparseDelta) -> tuple[Tensor, Tensor]:
    """The SM3 accumulators of a delta, ``[rows]`` and ``[cols]``, float32 (float64 for float64 values)."""
    state = delta.state
    if state.row is None or state.col is None:
        dtype = torch.promote_types(delta.values.dtype, torch.float32)
        device = delta.values.device
        state.row = torch.zeros(delta.rows, dtype=dtype, device=device)
        state.col = torch.zeros(delta.cols, dtype=dtype, device=device)
    return state.row, state.col


def _request(criterion: GrowthCriterion, delta: SparseDelta, count: int) -> GrowthRequest:
    window = delta.state.window if criterion.gathers else None
    row, col = accumulators(delta) if criterion.accumulates else (None, None)
    # Ours take the narrow indices as they are, which saves a copy.
    wide = delta.indices.dtype if criterion.propose in BUILT_IN else torch.int64
    return GrowthRequest(
        indices=delta.indices.to(wide),
        shape=(delta.rows, delta.cols),
        numel=delta.numel,
        count=count,
        candidates=None if window is None else window.positions.to(wide),
        candidate_sums=None if window is None else window.sums,
        row=row,
        col=col,
        generator=seeded_generator(delta.run.config.seed, delta.module_name, delta.state.closes + 1),
    )


def _problem_with(proposed: Any, numel: int) -> str | None:
    if not isinstance(proposed, Tensor):
        return f"a {type(proposed).__name__}"
    if proposed.dim() != 1 or proposed.dtype not in (torch.int32, torch.int64):
        return f"a {proposed.dtype} tensor of shape {tuple(proposed.shape)}"
    if bool(((proposed < NO_POSITION) | (proposed >= numel)).any()):
        return f"positions from {int(proposed.min())} to {int(proposed.max())}"
    in_order = proposed.index_select(0, sorted_order(proposed))
    in_order = in_order[in_order >= 0]
    repeats = int(torch.count_nonzero(in_order[1:] == in_order[:-1]))
    return f"{repeats} of its {proposed.numel()} positions more than once" if repeats else None


# Report


@dataclass(frozen=True)
class CycleReport:
    """One close of one adapter's cycle, summed over its matrices.

    Attributes:
        step: optimizer step after which it took place.
        rate: share of the deltas that the schedule offered for replacement.
        replaced: deltas that moved to another position.
        kept: deltas that stayed.
        mean_abs_delta: mean absolute delta before the close.
    """

    step: int
    rate: float
    replaced: int
    kept: int
    mean_abs_delta: float

    @property
    def churn(self) -> float:
        """Share of the deltas that moved."""
        total = self.replaced + self.kept
        return self.replaced / total if total else 0.0
