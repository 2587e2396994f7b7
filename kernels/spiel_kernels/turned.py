"""Activations kept column by column, as the dot products of the sampled gather read them.

A transposing copy is scalar work, as dear as the dot products themselves. Made in the forward pass it finds its input
in the caches, and layers that share an input (query, key and value; gate and up) share the copy. It takes the place of
the activation that would be kept for the backward pass, so memory stays the same.
"""

from __future__ import annotations

import threading
import weakref

from torch import Tensor


class _Slot:
    """The last copy, the tensor that it was made of, as long as that lives, and what that tensor's version was."""

    def __init__(self) -> None:
        self.kept: tuple[weakref.ref[Tensor], int, Tensor] | None = None


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.slot = _Slot()


_last = _PerThread()


def turned(x: Tensor) -> Tensor:
    """A copy of a matrix, or of a batch of rows, whose columns lie in memory one after the other.

    Args:
        x: ``[..., cols]`` on the CPU.

    Returns:
        ``[N, cols]`` with strides ``(1, N)``, outside of autograd. Asked again for the same tensor it returns the same
        copy, unless the tensor was written to or another one was asked for in between.
    """
    slot = _last.slot
    kept = slot.kept
    if kept is not None and kept[0]() is x and kept[1] == x._version:
        return kept[2]
    copy = x.detach().reshape(-1, x.shape[-1]).T.contiguous().T
    if not x.is_inference():  # has no version
        owner = weakref.ref(slot)

        def forget(reference: weakref.ref[Tensor]) -> None:
            slot = owner()
            if slot is not None and slot.kept is not None and slot.kept[0] is reference:
                slot.kept = None

        slot.kept = weakref.ref(x, forget), x._version, copy
    return copy


def is_turned(x: Tensor) -> bool:
    """Whether the columns of a matrix lie in memory one after the other."""
    return x.T.is_contiguous()
