"""Sparse deltas on convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spiel_kernels.gather import ConvGeometry

from ..delta import SparseDelta
from ..weight_ops import ConvOp
from .base import SpIELLayer
from .linear import autocast_dtype


class SpIELConv(SpIELLayer):
    """A one-, two- or three-dimensional convolution with sparse deltas; groups and all padding modes work."""

    known_forwards = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

    def _adapted_forward(self, deltas: list[SparseDelta], x: Tensor) -> Tensor:
        base = self.get_base_layer()
        compute_dtype = autocast_dtype(x, base.weight.dtype)
        if x.dtype != compute_dtype and not torch.is_autocast_enabled(x.device.type):
            return type(base).forward(base, x)  # raises what the base layer raises for a foreign dtype
        unbatched = x.dim() == len(base.kernel_size) + 1
        padded, padding = _pad(base, x.unsqueeze(0) if unbatched else x)
        geometry = ConvGeometry(self.info.weight_shape, base.stride, padding, base.dilation, base.groups)
        out = self._apply_adapted(ConvOp(geometry), deltas, padded.to(compute_dtype), base.bias)
        return out.squeeze(0) if unbatched else out

    def extra_repr(self) -> str:
        base = self.get_base_layer()
        return f"{base.in_channels}, {base.out_channels}, kernel_size={base.kernel_size}"


def _pad(base: nn.Module, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Apply padding that is not plain numeric zeros; returns the input and what is left for the convolution."""
    none = (0,) * len(base.kernel_size)
    if base.padding_mode != "zeros":
        return F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), none
    if not isinstance(base.padding, str):
        return x, tuple(base.padding)
    sides = list(base._reversed_padding_repeated_twice)
    if sides[::2] == sides[1::2]:
        return x, tuple(reversed(sides[::2]))
    return F.pad(x, sides), none
