"""The adapted weight of a bitsandbytes layer, in a workspace that all layers share."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spiel_kernels.dispatch import runs_triton
from spiel_kernels.quantized import dequantize_fold_4bit, dequantize_fold_8bit, fold_row_blocks, row_ranges
from spiel_kernels.quantized_layout import NestedScales, Packed4bit
from spiel_kernels.workspace import workspace


@torch.no_grad()
def adapted_in_workspace(
    base: nn.Module, deltas: Sequence[tuple[Tensor, Tensor]], compute_dtype: torch.dtype
) -> Tensor | None:
    """Dequantize the weight of a layer and add deltas to it, without a matrix of its own.

    The entries are those of PEFT's dequantized weight with `apply_deltas`, rounded once, to `compute_dtype`. The
    layer's bytes and scales are only read.

    Args:
        base: any layer.
        deltas: pairs of ``indices`` (``[k]``, sorted, unique) and ``values`` (``[k]``), on the layer's device.
        compute_dtype: floating dtype of the result.

    Returns:
        ``[out_features, in_features]`` in the shared workspace, valid until the next request of this thread (CPU) or
        stream (CUDA), see `spiel_kernels.workspace`. None for a layer that is not a bitsandbytes ``Linear4bit`` or
        ``Linear8bitLt``, that is not quantized yet or is offloaded, and for layouts that only bitsandbytes can read.
    """
    # Layers of bitsandbytes exist only where somebody has imported it.
    modules = sys.modules.get("bitsandbytes.nn")
    weight = getattr(base, "weight", None)
    if modules is None or not isinstance(weight, Tensor) or weight.device.type not in ("cpu", "cuda"):
        return None
    if isinstance(base, modules.Linear4bit):
        # Bytes that FSDP2 has gathered are a plain parameter; the layer knows the state too.
        state = getattr(weight, "quant_state", None) or getattr(base, "quant_state", None)
        return _adapted_4bit(weight.data, state, deltas, compute_dtype) if _readable_4bit(weight, state) else None
    if isinstance(base, modules.Linear8bitLt):
        return _adapted_8bit(base, weight, deltas, compute_dtype)
    return None


def _readable_4bit(weight: Tensor, state: Any) -> bool:
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return False  # not quantized, or repacked for a CPU kernel
    nested = getattr(state, "state2", None)
    return (
        len(state.shape) == 2
        and weight.shape[0] != 1  # what bitsandbytes takes for a transposed weight
        and weight.is_contiguous()
        and state.absmax.dtype == (torch.float32 if nested is None else torch.uint8)
        and state.absmax.device == weight.device
        and (nested is None or nested.dtype == torch.float32)
    )


def _adapted_4bit(
    packed: Tensor, state: Any, deltas: Sequence[tuple[Tensor, Tensor]], compute_dtype: torch.dtype
) -> Tensor:
    rows, cols = state.shape
    out = workspace(rows, cols, compute_dtype, packed.device)
    if not runs_triton(out, packed):
        return fold_row_blocks(_dequantized_by_bitsandbytes(packed, state), deltas, out)
    nested = None
    if state.state2 is not None:
        nested = NestedScales(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    weight = Packed4bit(packed, state.absmax, (rows, cols), state.dtype, state.quant_type, state.blocksize, nested)
    return dequantize_fold_4bit(weight, deltas, out)


def _dequantized_by_bitsandbytes(packed: Tensor, state: Any) -> Iterator[tuple[int, Tensor]]:
    """The matrix in blocks of rows, each with its first row, from bitsandbytes' own kernels."""
    functional = sys.modules["bitsandbytes.functional"]
    rows, cols = state.shape
    size = state.blocksize
    if cols % size:
        # Whole: on some CPUs bitsandbytes reads other scales where blocks straddle rows, and its layers do so too.
        yield 0, functional.dequantize_4bit(packed, state)
        return
    scales = state.absmax
    if state.state2 is not None:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    flat = packed.view(-1).view(torch.uint8)
    for first, last in row_ranges(rows, cols, packed.device):
        begin, end = first * cols, last * cols
        part = functional.QuantState(
            scales[begin // size : end // size],
            shape=torch.Size((last - first, cols)),
            blocksize=size,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        yield first, functional.dequantize_4bit(flat[begin // 2 : end // 2, None], part)


def _adapted_8bit(
    base: nn.Module, weight: Tensor, deltas: Sequence[tuple[Tensor, Tensor]], compute_dtype: torch.dtype
) -> Tensor | None:
    # The scales move from the parameter to the layer's state at its first forward pass.
    scales = base.state.SCB if base.state.SCB is not None else getattr(weight, "SCB", None)
    if weight.dtype != torch.int8 or weight.dim() != 2 or scales is None or scales.dtype != torch.float32:
        return None
    out = workspace(*weight.shape, compute_dtype, weight.device)
    return dequantize_fold_8bit(weight.data, scales.to(weight.device).view(-1), deltas, out)
