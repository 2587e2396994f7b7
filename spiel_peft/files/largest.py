"""The exact k largest of numbers too many to hold: found by counting, in passes over pieces of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# A float32's magnitude, read as an integer, ranks as the float does; half of its bits per pass.
_HALF = 16
_BUCKETS = 1 << _HALF


@dataclass
class Cut:
    """Which magnitudes belong to the k largest: all above a bound, and the first few of those equal to it.

    Attributes:
        bound: the magnitude, as the bits of its float32.
        ties: how many equal to it belong as well, and are not given out yet; those asked about first.
    """

    bound: int
    ties: int

    def choose(self, magnitudes: Tensor) -> Tensor:
        """Slots of the chosen among ``[n]`` float32 magnitudes, int64 ascending. Call in order, once per piece."""
        bits = magnitudes.view(torch.int32)
        chosen = bits > self.bound
        if self.ties:
            equal = (bits == self.bound).nonzero().flatten()[: self.ties]
            self.ties -= equal.numel()
            chosen[equal] = True
        return chosen.nonzero().flatten()


def find_cut(pieces: Callable[[], Iterable[Tensor]], k: int | None) -> Cut:
    """Find the k largest magnitudes, zeros left out; ties go to the earliest.

    Args:
        pieces: gives the magnitudes, float32 ``[n]`` each, not negative and finite; called up to twice.
        k: how many, at least 1; None for all.
    """
    if k is None:
        return Cut(0, 0)
    counts = torch.zeros(_BUCKETS, dtype=torch.int64)
    for piece in pieces():
        counts += torch.bincount(piece.view(torch.int32) >> _HALF, minlength=_BUCKETS)
    high, above = _bucket_of(counts, k)
    if high < 0:
        return Cut(0, 0)
    counts.zero_()
    for piece in pieces():
        bits = piece.view(torch.int32)
        counts += torch.bincount(bits[(bits >> _HALF) == high] & (_BUCKETS - 1), minlength=_BUCKETS)
    if high == 0:
        counts[0] = 0  # zeros
    low, more = _bucket_of(counts, k - above)
    if low < 0:
        return Cut(0, 0)
    return Cut((high << _HALF) | low, k - above - more)


def _bucket_of(counts: Tensor, k: int) -> tuple[int, int]:
    """The bucket that the k-th largest is in, and how many are in those above; -1 if there are not that many."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, k))
    if position == counts.numel():
        return -1, int(from_top[-1])
    above = int(from_top[position - 1]) if position else 0
    return counts.numel() - 1 - position, above
