"""Asks a growth criterion what to grow and what to prune in one matrix, and checks the answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spiel_kernels import sorted_order

from ..delta import SparseDelta
from ..seeding import seeded_generator
from .growth_registry import GrowthCriterion, GrowthRequest, PruneRequest


def propose(criterion: GrowthCriterion, delta: SparseDelta, count: int) -> Tensor:
    """What the criterion proposes for the close of this delta's cycle; int64, distinct, in range, best first.

    Raises:
        ValueError: a criterion may be anybody's, and this one proposed something else.
    """
    if criterion.propose is None or count == 0:
        return delta.indices[:0].to(torch.int64)
    proposed = criterion.propose(_request(criterion, delta, count))
    problem = _problem_with(proposed, delta.numel)
    if problem is not None:
        raise ValueError(
            f"growth criterion {criterion.name!r} must propose distinct positions in [0, {delta.numel}) as a "
            f"one-dimensional integer tensor; for {delta.module_name!r} it proposed {problem}"
        )
    return proposed.to(device=delta.indices.device, dtype=torch.int64)


def prune_scores(criterion: GrowthCriterion, delta: SparseDelta, count: int) -> Tensor:
    """What the criterion says each delta ``[k]`` is worth; the lowest scores are pruned first.

    Raises:
        ValueError: the criterion's own score is no floating tensor of that shape, or has NaN.
    """
    values = delta.values.detach()
    if criterion.prune_score is None:
        return values.abs()
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
    return GrowthRequest(
        indices=delta.indices.to(torch.int64),
        shape=(delta.rows, delta.cols),
        numel=delta.numel,
        count=count,
        candidates=None if window is None else window.positions.to(torch.int64),
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
    if bool(((proposed < 0) | (proposed >= numel)).any()):
        return f"positions from {int(proposed.min())} to {int(proposed.max())}"
    in_order = proposed.index_select(0, sorted_order(proposed))
    repeats = int(torch.count_nonzero(in_order[1:] == in_order[:-1]))
    return f"{repeats} of its {proposed.numel()} positions more than once" if repeats else None
