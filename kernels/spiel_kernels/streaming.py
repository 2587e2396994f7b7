"""Finds the k largest of many scores exactly, in one tensor or in blocks that arrive one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .dispatch import operation
from .index_set import index_dtype, true_slots

# A threshold is guessed from a sample of at least so many scores, of which at least so many reach it. The number of all
# scores that reach it is then off by less than a fifth.
_SAMPLE = 4096
_SAMPLE_REACHED = 256
# Standard deviations by which the guess is lower than the sample says: a threshold that fewer than k reach is useless.
_MARGIN = 2.5
# Scores are compared with a bound in groups of this size, by their largest; that rarely is above the bound.
_GROUP = 8


def best_mask(scores: Tensor, k: int) -> Tensor:
    """Marks the `k` largest scores; among equal scores the earlier slot wins. Does not wait for the device.

    ``torch.topk`` leaves the choice among ties open, so two runs, or two devices, could differ.

    Args:
        scores: ``[n]``, no NaN.
        k: at least 1 and at most n.

    Returns:
        bool ``[n]``.
    """
    threshold = torch.topk(scores, k, sorted=False).values.min()
    above, ties = scores > threshold, scores == threshold
    place = ties.cumsum(0, dtype=index_dtype(scores.numel()))
    return above.logical_or_(ties.logical_and_(place <= k - above.sum()))


def _fake_stable_topk(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty(min(k, scores.numel()), dtype=torch.int64)


@operation("stable_topk(Tensor scores, int k) -> Tensor", _fake_stable_topk)
def stable_topk(scores: Tensor, k: int) -> Tensor:
    """Slots of the `k` largest scores; among equal scores the earlier slot wins.

    Args:
        scores: ``[n]``, no NaN.
        k: how many, at least 0; more than n returns all.

    Returns:
        int64 ``[min(k, n)]`` in ascending order of slots.
    """
    check_k(k)
    if k >= scores.numel():
        return torch.arange(scores.numel(), device=scores.device)
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    return true_slots(best_mask(scores, k))


def check_k(k: int) -> None:
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")


def sampled_threshold(pieces: Sequence[Tensor], k: int) -> float:
    """A value that probably k of the scores in `pieces` reach, and not many more; may be NaN if a score is NaN.

    Args:
        pieces: ``[n_i]`` each, not all empty.
        k: at least 1 and at most the number of scores.
    """
    total = sum(piece.numel() for piece in pieces)
    share = k / total
    # An odd step meets all columns of a matrix whose width is a power of two.
    step = int(total / max(_SAMPLE, _SAMPLE_REACHED / share)) | 1
    sample = torch.cat([piece[::step] for piece in pieces])
    size = sample.numel()
    rank = int(share * size + _MARGIN * math.sqrt(share * (1 - share) * size)) + 1
    return float(torch.topk(sample, min(max(rank, 1), size), sorted=False).values.min())


def few_above(scores: Tensor, bound: float) -> Tensor | None:
    """Slots of `scores` ``[n]`` above `bound`, int64 ascending, without NaN; None if they are not few.

    Looks at the largest of eight scores first, and at all eight only where that is above the bound.
    """
    grouped = scores.numel() // _GROUP * _GROUP
    groups = scores[:grouped].view(_GROUP, -1)
    # Asked as "not at or below the bound": the largest of a group with a NaN is NaN, and the group has to be looked at.
    some = true_slots((groups.amax(0) <= bound).logical_not_())
    if _GROUP * some.numel() > grouped // 3:
        return None
    member, group = (groups.index_select(1, some) > bound).nonzero(as_tuple=True)
    slots = some.index_select(0, group).add_(member, alpha=grouped // _GROUP)
    rest = true_slots(scores[grouped:] > bound)
    return torch.cat([slots, rest + grouped]) if rest.numel() else slots


class StreamingTopK:
    """The k largest of many scores that arrive in blocks of ascending positions.

    Holds at most 3 k scores, or a block's, between blocks; ties go to the lowest position, and scores at or below
    `floor` (as well as NaN) are never chosen.

    Args:
        k: how many to keep.
        floor: exclusive lower bound of a score that may be chosen.
    """

    def __init__(self, k: int, floor: float = 0.0) -> None:
        self.k = k
        # A score must be above the bound: first the floor, later a value that k of the scores held reach. A score equal
        # to that loses, as the scores held have lower positions.
        self._bound = floor
        self._bounded = False
        self._scores: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._held = 0
        self._held_at_bound = 0

    def update(self, scores: Tensor, positions: Tensor | int) -> None:
        """Offer a block.

        Args:
            scores: ``[n]``.
            positions: int64 ``[n]`` ascending and above all earlier ones, or the int offset of a dense block.
        """
        if self.k == 0 or scores.numel() == 0:
            return
        slots = few_above(scores, self._bound)
        if slots is None:
            slots = self._many_above(scores)
        self._scores.append(scores.index_select(0, slots))
        self._positions.append(slots + positions if isinstance(positions, int) else positions.index_select(0, slots))
        self._held += slots.numel()
        if self._held >= max(self.k, self._held_at_bound + self.k // 4):
            self._raise_bound()
        if self._held > 3 * self.k:
            self._shrink()

    def result(self) -> Tensor:
        """int64 positions of the k largest scores, ascending; fewer if fewer were above the floor."""
        if not self._scores:
            return torch.empty(0, dtype=torch.int64)
        if self._held > self.k:
            self._shrink()
        return self._positions[0] if len(self._positions) == 1 else torch.cat(self._positions)

    def _many_above(self, scores: Tensor) -> Tensor:
        """Slots of `scores` above the bound, which is raised first if k of these scores reach a higher one."""
        if not self._bounded and scores.numel() > self.k:
            threshold = sampled_threshold([scores], self.k)
            if threshold > self._bound:
                slots = true_slots(scores >= threshold)
                if slots.numel() >= self.k:
                    self._bound, self._bounded = threshold, True
                    return slots
        return true_slots(scores > self._bound)

    def _raise_bound(self) -> None:
        """Raise the bound to a value that k of the scores held reach, if a sample of them shows one."""
        threshold = sampled_threshold(self._scores, self.k)
        if threshold > self._bound:
            reached = sum(int(torch.count_nonzero(scores >= threshold)) for scores in self._scores)
            if reached >= self.k:
                self._bound, self._bounded = threshold, True
        self._held_at_bound = self._held

    def _shrink(self) -> None:
        """Drop all scores held but the k best."""
        scores, positions = torch.cat(self._scores), torch.cat(self._positions)
        if self._bounded:
            slots = true_slots(scores >= self._bound)
            scores, positions = scores.index_select(0, slots), positions.index_select(0, slots)
        slots = stable_topk(scores, self.k)
        scores, positions = scores.index_select(0, slots), positions.index_select(0, slots)
        self._scores, self._positions = [scores], [positions]
        self._held = self._held_at_bound = scores.numel()
        self._bound, self._bounded = float(scores.min()), True


def topk_of_blocks(blocks: Iterable[tuple[int, Tensor]], k: int, device: torch.device) -> Tensor:
    """Positions of the k largest scores above zero, int64 ascending, on `device`.

    Args:
        blocks: the position of each block's first score, ascending, and the block's scores of any shape.
    """
    top = StreamingTopK(k)
    if k == 0:
        return top.result().to(device)  # blocks are expensive to make
    for first, scores in blocks:
        top.update(scores.flatten(), first)
    return top.result().to(device)
