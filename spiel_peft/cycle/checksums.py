"""Checksums of tensors, to compare across processes without sending the tensors."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd 64-bit multipliers with well mixed bits; their products wrap around.
_BY_VALUE, _BY_PLACE, _AGAIN = 0x5851F42D4C957F2D, 0x14057B7EF767814F, 0x2545F4914F6CDD1D
_CHUNK = 1 << 20


def checksum(tensor: Tensor) -> Tensor:
    """An int64 (0-dimensional, on the tensor's device) that depends on every bit of a tensor and on its place.

    A sum of integers that wraps around does not depend on the order in which a device adds them.
    """
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    # In pieces: an int64 copy of a large matrix's deltas is more than they take themselves.
    for start in range(0, bits.numel(), _CHUNK):
        piece = bits[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start + 1, start + 1 + piece.numel(), device=flat.device)
        mixed = (piece + 1) * _BY_VALUE + places * _BY_PLACE
        mixed = (mixed ^ (mixed >> 29)) * _AGAIN
        total += (mixed ^ (mixed >> 32)).sum()
    return total
