"""What a merge into quantized weights has lost."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class MergeLoss:
    """Counts of merged deltas and of those that rounding has swallowed.

    Attributes:
        total: entries whose delta is not zero.
        lost: those whose weight moved by less than half of the delta.
    """

    total: int = 0
    lost: int = 0

    def __iadd__(self, other: MergeLoss) -> MergeLoss:
        self.total += other.total
        self.lost += other.lost
        return self


def count_lost(original: Tensor, wanted: Tensor, merged: Tensor) -> MergeLoss:
    """Compare what a merge should have done to some entries with what it did.

    Args:
        original, wanted, merged: ``[u]`` floating: entries before the merge, the exact sums, entries after it.
    """
    delta = wanted.double() - original.double()
    moved = merged.double() - original.double()
    touched = delta != 0
    lost = touched & (moved * delta.sign() < delta.abs() / 2)
    return MergeLoss(total=int(touched.sum()), lost=int(lost.sum()))
