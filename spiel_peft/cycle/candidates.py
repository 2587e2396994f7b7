"""Candidates that several ranks choose together. Pure functions of tensors.

Every rank proposes the positions of its own largest gradients; a position's score is the sum of what ranks said of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spiel_kernels import sorted_order

NO_POSITION = -1
# Candidates of a shortlist, as a multiple of k: all that two ranks can propose.
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
    """What is left of a union and its sums if there is more than ranks shall gather: the best by absolute sum."""
    if union.numel() <= SHORTLIST * k:
        return union, sums
    best = best_slots(sums.abs(), SHORTLIST * k)
    return union[best], sums[best]


def best_slots(scores: Tensor, count: int) -> Tensor:
    """Ascending slots of the `count` highest scores (all if there are fewer); ties go to the lowest slot."""
    best = sorted_order(scores, descending=True)[:count]
    return torch.sort(best).values
