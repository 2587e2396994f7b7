"""The adapted layers for linear layers, convolutions and embeddings: compute dtypes, padding, scaling.

Also says which GPU kernels the training of a linear layer needs, and compiles them ahead of the first step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import spiel_kernels
from spiel_kernels.gather import ConvGeometry

from ..autograd.operations import ConvOp, EmbeddingOp, LinearOp
from ..delta import SparseDelta
from ..weights.base_weight import TRANSPOSED
from ..weights.quantized import stored_as
from .base import SpIELLayer

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class SpIELLinear(SpIELLayer):
    """A linear layer, plain, transposed or quantized, with sparse deltas."""

    known_forwards = (nn.Linear.forward, Conv1D.forward)

    def _knows_forward(self, base: nn.Module) -> bool:
        return self.quantization_backend is not None or super()._knows_forward(base)

    def _adapted_forward(self, deltas: list[SparseDelta], x: Tensor) -> Tensor:
        base = self.get_base_layer()
        if self.quantization_backend is not None:
            return self._quantized_forward(base, deltas, x)
        compute_dtype = autocast_dtype(x, base.weight.dtype)
        if x.dtype != compute_dtype and not torch.is_autocast_enabled(x.device.type):
            return type(base).forward(base, x)  # raises the base layer's error for inputs of another dtype
        op = LinearOp(transposed=self.info.kind == TRANSPOSED)
        return self._apply_adapted(op, deltas, x.to(compute_dtype), base.bias)

    def _quantized_forward(self, base: nn.Module, deltas: list[SparseDelta], x: Tensor) -> Tensor:
        if getattr(base, "compute_type_is_set", True) is False:
            # bitsandbytes settles the compute dtype at the first input it sees.
            base.set_compute_type(x)
            base.compute_type_is_set = True
        compute_dtype = getattr(base, "compute_dtype", None) or autocast_dtype(x, x.dtype)
        bias = getattr(base, "bias", None)
        return self._apply_adapted(LinearOp(False), deltas, x.to(compute_dtype), bias).to(x.dtype)


def autocast_dtype(x: Tensor, default: torch.dtype) -> torch.dtype:
    """The dtype in which torch would run a matrix product with x: autocast's if that is on, else `default`."""
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return default


class SpIELConv(SpIELLayer):
    """A one-, two- or three-dimensional convolution with sparse deltas; groups and all padding modes work."""

    known_forwards = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

    def _adapted_forward(self, deltas: list[SparseDelta], x: Tensor) -> Tensor:
        base = self.get_base_layer()
        compute_dtype = autocast_dtype(x, base.weight.dtype)
        if x.dtype != compute_dtype and not torch.is_autocast_enabled(x.device.type):
            return type(base).forward(base, x)  # raises the base layer's error for inputs of another dtype
        unbatched = x.dim() == len(base.kernel_size) + 1
        padded, padding = _pad(base, x.unsqueeze(0) if unbatched else x)
        geometry = ConvGeometry(self.info.weight_shape, base.stride, padding, base.dilation, base.groups)
        out = self._apply_adapted(ConvOp(geometry), deltas, padded.to(compute_dtype), base.bias)
        return out.squeeze(0) if unbatched else out

    def extra_repr(self) -> str:
        base = self.get_base_layer()
        return f"{base.in_channels}, {base.out_channels}, kernel_size={base.kernel_size}"


def _pad(base: nn.Module, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Apply padding that is not numeric zeros; returns the padded input and the padding left to the convolution."""
    none = (0,) * len(base.kernel_size)
    if base.padding_mode != "zeros":
        return F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), none
    if not isinstance(base.padding, str):
        return x, tuple(base.padding)
    sides = list(base._reversed_padding_repeated_twice)
    if sides[::2] == sides[1::2]:
        return x, tuple(reversed(sides[::2]))
    return F.pad(x, sides), none


class SpIELEmbedding(SpIELLayer):
    """An embedding with sparse deltas; a scaled embedding (`embed_scale`, as in Gemma) scales the deltas too."""

    known_forwards = (nn.Embedding.forward,)

    def _knows_forward(self, base: nn.Module) -> bool:
        return super()._knows_forward(base) or self._get_embed_scale() is not None

    def _adapted_forward(self, deltas: list[SparseDelta], x: Tensor) -> Tensor:
        base = self.get_base_layer()
        op = EmbeddingOp(self.info.weight_shape[0], base.padding_idx, base.scale_grad_by_freq)
        out = self._apply_adapted(op, deltas, x)
        scale = self._get_embed_scale()
        if scale is None:
            return out
        # As models do: those with a tensor round it to the table's dtype, those with a number do not.
        own = base.embed_scale
        return out * (own if isinstance(own, (int, float)) else scale.to(out.dtype))

    def extra_repr(self) -> str:
        base = self.get_base_layer()
        return f"{base.num_embeddings}, {base.embedding_dim}"


def warm_up(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Compile the GPU kernels that training a model's SpIEL adapters needs, before the first step.

    No run needs it: kernels are compiled when they are launched first, and kept in Triton's cache on the disk. With
    it the first steps take no longer than later ones, and ranks that share no disk do not wait for each other.

    Args:
        model: an adapted model on its GPU; on another device there is nothing to compile.
        dtype: in which linear layers compute, if that is not the dtype of their weights: autocast's, or the one of the
            activations for 8-bit layers (float16 by default).

    Returns:
        How many kernels are ready.
    """
    kinds: dict[torch.device, list[spiel_kernels.MatrixKind]] = {}
    for layer in model.modules():
        if isinstance(layer, SpIELLinear):
            for delta in layer.spiel_delta.values():
                kind = matrix_kind(layer, delta, dtype)
                if kind is not None:
                    kinds.setdefault(delta.values.device, []).append(kind)
    return sum(spiel_kernels.warm_up(found, device) for device, found in kinds.items())


def matrix_kind(
    layer: SpIELLinear, delta: SparseDelta, dtype: torch.dtype | None = None
) -> spiel_kernels.MatrixKind | None:
    """What kernels have to be compiled for to train a delta of a linear layer; None if there are none for it.

    Args:
        dtype: as for `warm_up`.
    """
    base = layer.get_base_layer()
    stored, weight_dtype, blocksize = "plain", None, 64
    if layer.quantization_backend is None:
        weight_dtype = base.weight.dtype
        computes = dtype or weight_dtype
    else:
        stored, weight_dtype, blocksize = stored_as(base) or (stored, weight_dtype, blocksize)
        computes = getattr(base, "compute_dtype", None) or dtype or weight_dtype or torch.float16
    if computes not in _KERNEL_DTYPES or (weight_dtype or computes) not in _KERNEL_DTYPES:
        return None
    rows, cols = layer.info.weight_shape
    values = delta.values.dtype
    return spiel_kernels.MatrixKind(rows, cols, computes, stored, weight_dtype, values=values, blocksize=blocksize)
