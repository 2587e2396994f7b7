"""Calls every function that launches kernels, once for each form that a matrix's training can meet.

Nothing here depends on what the kernels compute, so that launches can be recorded, or their kernels compiled, from
tensors on a CPU. Where a launch function decides by sizes or by a plan, each outcome is called for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..index_set import index_dtype, sample_positions
from ..matrix_kind import MatrixKind
from ..outer_plan import TILE_SHAPES, plan_outer
from ..quantized_layout import NestedScales, Packed4bit
from . import fold, momentum, outer, quantized, select, top_outer

# Tokens of the operands of a gather, and of a selection, whose products are computed on the CPU.
_TOKENS = 2048
_FEW_TOKENS = 16


def _index_set(kind: MatrixKind) -> Tensor:
    drawn = sample_positions(kind.numel, min(kind.k, kind.numel), torch.Generator().manual_seed(0))
    return drawn.to(index_dtype(kind.numel))


def launch_folds(kind: MatrixKind) -> None:
    """Make the adapted weight, with a delta and without one."""
    indices = _index_set(kind)
    delta = (indices, torch.empty(indices.numel(), dtype=kind.values))
    out = torch.empty(kind.rows, kind.cols, dtype=kind.dtype)
    if kind.stored == "plain":
        fold.write_adapted(torch.empty_like(out, dtype=kind.base_dtype), *delta, out)
        return
    for one in (delta, None):
        if kind.stored == "int8":
            stored = torch.empty(kind.rows, kind.cols, dtype=torch.int8)
            quantized.launch_8bit(stored, torch.empty(kind.rows), one, out)
        else:
            quantized.launch_4bit(_packed(kind), one, out)


def _packed(kind: MatrixKind) -> Packed4bit:
    quant_type, _, nested = kind.stored.partition(" ")
    blocks = -(-kind.numel // kind.blocksize)
    return Packed4bit(
        torch.empty((kind.numel + 1) // 2, dtype=torch.uint8),
        torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        (kind.rows, kind.cols),
        kind.base_dtype,
        quant_type,
        kind.blocksize,
        NestedScales(torch.empty(256), torch.empty(-(-blocks // 256)), torch.empty(())) if nested else None,
    )


def launch_gathers(kind: MatrixKind) -> None:
    """Gather the gradient at the deltas by every method and with every tile that a plan may choose."""
    indices = _index_set(kind)
    a, b = (torch.empty(_TOKENS, width, dtype=kind.dtype) for width in (kind.rows, kind.cols))
    for method, shape in [("entries", None), ("dense", None), *(("compact", shape) for shape in TILE_SHAPES)]:
        plan = plan_outer(indices, kind.rows, kind.cols, _TOKENS, kind.dtype, method, tile_shape=shape)
        outer.gather_outer(a, b, indices, plan)


def launch_selection(kind: MatrixKind) -> None:
    """Choose candidates."""
    a, b = (torch.zeros(_FEW_TOKENS, width, dtype=kind.dtype) for width in (kind.rows, kind.cols))
    select.topk_outer(a, b, min(kind.k, kind.numel))


def launch_momentum(kind: MatrixKind) -> None:
    """Take the gradient into SM3's accumulators, and list the best positions by them."""
    indices = _index_set(kind)
    momentum.sm3_accumulate_(torch.empty(kind.rows), torch.empty(kind.cols), indices, torch.empty(indices.numel()))
    logs = (torch.empty(size, dtype=torch.float64) for size in (kind.rows, kind.cols))
    top_outer.list_candidates(*logs, indices, indices.numel())


def launch_all(kind: MatrixKind) -> None:
    """Every launch that training a matrix of this kind can make."""
    for launch in (launch_folds, launch_gathers, launch_selection, launch_momentum):
        launch(kind)
