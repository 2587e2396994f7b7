"""The decision of a close: which active positions leave and which come. A pure function of tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spiel_kernels import sorted_order


@dataclass(frozen=True)
class Exchange:
    """What a close does to one index set.

    Attributes:
        drop: bool ``[k]``, True for the slots that leave.
        grown: int64 ``[m]``, the new positions, best first; as many as slots leave.
    """

    drop: Tensor
    grown: Tensor


def decide_exchange(indices: Tensor, scores: Tensor, proposed: Tensor, count: int) -> Exchange:
    """Prune the deltas with the lowest scores in favour of the best proposals.

    The m active deltas with the lowest scores are pruned (ties: the lowest position first) and the m best
    proposals outside the kept set are grown. A proposal that was just pruned comes back and keeps its delta. With
    too few proposals m shrinks to what they can fill.

    Args:
        indices: integer ``[k]``, sorted, unique.
        scores: floating ``[k]``, what each delta is worth, without NaN; SpIEL takes its absolute value.
        proposed: int64 ``[c]``, positions without repeats, best first, active ones allowed.
        count: how many to prune at most.

    Returns:
        The exchange net of positions that come back.
    """
    active = indices.to(torch.int64)
    count = min(count, active.numel())
    order = sorted_order(scores)
    # Looked up in ascending order, which takes half the time of any other.
    by_position = sorted_order(proposed)
    slots = torch.empty_like(by_position)
    slots[by_position] = torch.searchsorted(active, proposed.index_select(0, by_position))
    slots.clamp_(max=active.numel() - 1)
    is_active = active.index_select(0, slots) == proposed
    # rank[s]: how early slot s would be pruned
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    proposed_rank = torch.where(is_active, rank[slots], torch.full_like(slots, -1))
    count = _largest_fillable(proposed_rank, count)
    # Inactive proposals have rank -1: they are always eligible; active ones only if they would be pruned.
    chosen = (proposed_rank < count).nonzero().flatten()[:count]
    returning = slots[chosen][is_active[chosen]]
    drop = torch.zeros(active.numel(), dtype=torch.bool, device=active.device)
    drop[order[:count]] = True
    drop[returning] = False
    return Exchange(drop, proposed[chosen[~is_active[chosen]]])


def _largest_fillable(proposed_rank: Tensor, count: int) -> int:
    """The largest m up to `count` for which at least m proposals are eligible once m deltas are pruned.

    Pruning one more delta makes at most one more proposal eligible, so the surplus of proposals never grows with m.
    """
    inactive = int((proposed_rank < 0).sum())
    returning = torch.bincount(proposed_rank[(proposed_rank >= 0) & (proposed_rank < count)], minlength=count)[:count]
    pruned = torch.arange(1, count + 1, device=proposed_rank.device)
    fits = inactive + returning.cumsum(0) >= pruned
    return int(fits.sum())
