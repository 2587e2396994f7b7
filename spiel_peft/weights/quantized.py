"""Makes the adapted weight of a bitsandbytes layer, in memory that all layers share."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spiel_kernels.dispatch import runs_triton
from spiel_kernels.quantized import dequantize_fold_4bit, dequantize_fold_8bit, fold_row_blocks, row_ranges
from spiel_kernels.quantized_layout import NestedScales, Packed4bit
from spiel_kernels.workspace import workspace


@contextmanager
def adapted_in_workspace(
    base: nn.Module, deltas: Sequence[tuple[Tensor, Tensor]], compute_dtype: torch.dtype
) -> Iterator[Tensor | None]:
    """Dequantize the weight of a layer and add deltas to it, for the length of a block, in a shared workspace.

    The entries are those of PEFT's dequantized weight with `apply_deltas`, rounded once, to `compute_dtype`. The
    layer's bytes and scales are only read.

    Args:
        base: any layer.
        deltas: pairs of ``indices`` (``[k]``, sorted, unique) and ``values`` (``[k]``), on the layer's device.
        compute_dtype: floating dtype of the result.

    Yields:
        ``[out_features, in_features]``, valid until the block ends, in which the operation that reads it has to be
        issued (see `spiel_kernels.workspace`). None for layers other than bitsandbytes' ``Linear4bit`` and
        ``Linear8bitLt``, for a layer that is not quantized yet or is offloaded, and for layouts that only bitsandbytes
        can read.
    """
    packed = _packed_weight(base)
    if packed is None:
        yield None
        return
    with workspace(packed.shape, compute_dtype, packed.codes.device) as out:
        with torch.no_grad():
            packed.write_adapted(deltas, out)
        yield out


def _packed_weight(base: nn.Module) -> _Packed4bit | _Packed8bit | None:
    # Layers of bitsandbytes exist only where it has been imported.
    modules = sys.modules.get("bitsandbytes.nn")
    weight = getattr(base, "weight", None)
    if modules is None or not isinstance(weight, Tensor) or weight.device.type not in ("cpu", "cuda"):
        return None
    if isinstance(base, modules.Linear4bit):
        # FSDP2 gathers the bytes as a plain parameter without the state; the layer holds the state too.
        state = getattr(weight, "quant_state", None) or getattr(base, "quant_state", None)
        return _Packed4bit(weight.data, state) if _readable_4bit(weight, state) else None
    if isinstance(base, modules.Linear8bitLt):
        # The scales move from the parameter to the layer's state at its first forward pass.
        scales = base.state.SCB if base.state.SCB is not None else getattr(weight, "SCB", None)
        readable = weight.dtype == torch.int8 and weight.dim() == 2 and scales is not None
        return _Packed8bit(weight.data, scales) if readable and scales.dtype == torch.float32 else None
    return None


def stored_as(base: nn.Module) -> tuple[str, torch.dtype | None, int] | None:
    """How the kernels see the weight of a bitsandbytes layer.

    Returns:
        What `spiel_kernels.MatrixKind` calls ``stored``, ``weight_dtype`` and ``blocksize``; None for layers whose
        weight `adapted_in_workspace` cannot make.
    """
    packed = _packed_weight(base)
    if isinstance(packed, _Packed4bit):
        nested = " nested" if packed.state.state2 is not None else ""
        return packed.state.quant_type + nested, packed.state.dtype, packed.state.blocksize
    return None if packed is None else ("int8", None, 64)


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


class _Packed4bit:
    """The bytes of a `Linear4bit` and their quantization state."""

    def __init__(self, codes: Tensor, state: Any) -> None:
        self.codes, self.state = codes, state
        self.shape: tuple[int, int] = tuple(state.shape)

    def write_adapted(self, deltas: Sequence[tuple[Tensor, Tensor]], out: Tensor) -> None:
        codes, state = self.codes, self.state
        if not runs_triton(out, codes):
            fold_row_blocks(_dequantized_by_bitsandbytes(codes, state), deltas, out)
            return
        nested = None
        if state.state2 is not None:
            nested = NestedScales(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
        weight = Packed4bit(codes, state.absmax, self.shape, state.dtype, state.quant_type, state.blocksize, nested)
        dequantize_fold_4bit(weight, deltas, out)


class _Packed8bit:
    """The rows of a `Linear8bitLt` and their scales."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales
        self.shape: tuple[int, int] = tuple(codes.shape)

    def write_adapted(self, deltas: Sequence[tuple[Tensor, Tensor]], out: Tensor) -> None:
        dequantize_fold_8bit(self.codes, self.scales.to(self.codes.device).view(-1), deltas, out)


def _dequantized_by_bitsandbytes(packed: Tensor, state: Any) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows of the matrix, each with the number of its first row, from bitsandbytes' own kernels."""
    functional = sys.modules["bitsandbytes.functional"]
    rows, cols = state.shape
    size = state.blocksize
    if cols % size:
        # All rows at once: where blocks straddle rows, bitsandbytes reads other scales on some CPUs, as its layers do.
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
