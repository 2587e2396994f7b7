"""The built-in growth criteria: which positions are best to grow. Pure functions of a `GrowthRequest`."""

from __future__ import annotations

import torch
from torch import Tensor

from spiel_kernels import sample_positions, sorted_order, top_outer_positions

from .growth_registry import GrowthRequest, register_growth_criterion


def accumulated_gradient(request: GrowthRequest) -> Tensor:
    """SpIEL-AG (Ansell et al., 2024, section 3.2): candidates by the absolute sum of their gradients.

    Zero sums are no candidates; ties go to the lowest position.
    """
    if request.candidates is None or request.candidate_sums is None:
        return torch.empty(0, dtype=torch.int64, device=request.indices.device)
    scores = request.candidate_sums.abs()
    # Candidates are in ascending order, so a stable sort settles ties.
    order = sorted_order(scores, descending=True)
    return request.candidates.index_select(0, order[: int(torch.count_nonzero(scores > 0))])


def momentum(request: GrowthRequest) -> Tensor:
    """SpIEL-MA (Ansell et al., 2024, section 3.3): inactive positions by log row + log col of SM3's accumulators."""
    if request.row is None or request.col is None:
        return torch.empty(0, dtype=torch.int64, device=request.indices.device)
    return top_outer_positions(request.row, request.col, request.indices, request.count)


def random(request: GrowthRequest) -> Tensor:
    """Inactive positions, uniformly."""
    inactive = request.numel - request.indices.numel()
    count = min(request.count, inactive)
    ranks = sample_positions(inactive, count, request.generator)
    active = request.indices.cpu()
    # The r-th inactive position is r plus the active positions at or below it: active[j] - j never falls, so count
    # how many of these offsets are at most r.
    offsets = active - torch.arange(active.numel())
    positions = ranks + torch.searchsorted(offsets, ranks, right=True)
    return positions[torch.randperm(count, generator=request.generator)].to(request.indices.device)


register_growth_criterion("accumulated_gradient", accumulated_gradient, gathers=True)
register_growth_criterion("momentum", momentum, accumulates=True)
register_growth_criterion("random", random)
register_growth_criterion("none", None)
