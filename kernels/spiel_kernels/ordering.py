"""Orders and slots of small arrays. On a CPU by NumPy, whose sort takes a tenth of the time of PyTorch's."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_AS_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)


def sorted_order(keys: Tensor, descending: bool = False) -> Tensor:
    """Slots in the order of their keys; among equal keys the earlier slot comes first, either way round.

    Args:
        keys: ``[n]``, floating or integer, no NaN.

    Returns:
        int64 ``[n]``.
    """
    ordered = _as_int32(keys) if keys.device.type == "cpu" else None
    if ordered is None:
        return torch.sort(keys, stable=True, descending=descending).indices
    # Key and slot in one number, so that no two are equal and any sort is stable.
    wide = ordered.to(torch.int64)
    packed = (~wide if descending else wide) * (1 << 32) + torch.arange(keys.numel())
    in_order = packed.numpy()
    in_order.sort()
    return packed.bitwise_and_((1 << 32) - 1)


def _as_int32(keys: Tensor) -> Tensor | None:
    """Integers of 32 bits in the same order, or None where there are none."""
    if type(keys) is not Tensor or keys.numel() >= 1 << 31:
        return None
    if keys.dtype in _AS_FLOAT32:
        bits = (keys.detach().to(torch.float32) + 0.0).view(torch.int32)  # there is one zero now
        # Of negative floats larger bits mean a smaller number.
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if keys.dtype in (torch.int32, torch.int16, torch.uint8):
        return keys
    if keys.dtype == torch.int64 and keys.numel():
        low, high = torch.aminmax(keys)
        return keys if -(1 << 31) <= int(low) and int(high) < 1 << 31 else None
    return None


def true_slots(mask: Tensor) -> Tensor:
    """int64 slots at which a one-dimensional bool tensor is True, ascending."""
    if mask.device.type == "cpu" and type(mask) is Tensor:
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().flatten()
