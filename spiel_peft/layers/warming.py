"""Compiles the GPU kernels of a model's training ahead of its first step."""

from __future__ import annotations

import torch
from torch import nn

import spiel_kernels

from ..delta import SparseDelta
from ..weights.quantized import stored_as
from .kinds import SpIELLinear

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
