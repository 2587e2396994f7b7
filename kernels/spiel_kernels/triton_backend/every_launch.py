"""Calls every function that launches kernels, once for each form that a matrix's training can meet.

Nothing here depends on what the kernels compute, so that their launches can be recorded or compiled only, from tensors on
a CPU. Where a launch function decides by sizes or by a plan, each outcome is called for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..index_set import index_dtype, sample_positions
from ..outer_plan import TILE_SHAPES, plan_outer
from ..quantized_layout import NestedScales, Packed4bit
from . import fold, momentum, outer, quantized, select

# Tokens of the operands of a gather, and of a selection, whose products PyTorch computes.
_TOKENS = 2048
_FEW_TOKENS = 64
STORED = ("plain", "nf4", "nf4 nested", "fp4", "fp4 nested", "int8")


@dataclass(frozen=True)
class MatrixKind:
    """What kernels are compiled for: the form of a weight and of what training it works on.

    Args:
        rows: of the weight (output features of a linear layer); cols: its columns.
        dtype: of activations, output gradients and the adapted weight: bfloat16, float16 or float32.
        stored: how the base weight is stored: "plain" (in `dtype`), "nf4" or "fp4" (with " nested" if the scales are
            quantized too), or "int8".
        k: number of deltas.
        values: dtype of the deltas.
        blocksize: elements that share a scale of 4-bit weights.
    """

    rows: int
    cols: int
    dtype: torch.dtype
    stored: str = "plain"
    k: int = 1024
    values: torch.dtype = torch.float32
    blocksize: int = 64

    def __post_init__(self) -> None:
        if self.stored not in STORED:
            raise ValueError(f"stored must be one of {', '.join(STORED)}, got {self.stored!r}")
        if self.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"dtype must be bfloat16, float16 or float32, got {self.dtype}")
        if self.rows < 1 or self.cols < 1 or self.k < 1:
            raise ValueError(f"rows, cols and k must be at least 1, got {self.rows}, {self.cols} and {self.k}")

    def index_set(self) -> Tensor:
        numel = self.rows * self.cols
        drawn = sample_positions(numel, min(self.k, numel), torch.Generator().manual_seed(0))
        return drawn.to(index_dtype(numel))


def launch_folds(kind: MatrixKind) -> None:
    """Make the adapted weight, with a delta and without one."""
    indices = kind.index_set()
    delta = (indices, torch.empty(indices.numel(), dtype=kind.values))
    out = torch.empty(kind.rows, kind.cols, dtype=kind.dtype)
    if kind.stored == "plain":
        fold.write_adapted(torch.empty_like(out), *delta, out)
        return
    for one in (delta, None):
        if kind.stored == "int8":
            stored = torch.empty(kind.rows, kind.cols, dtype=torch.int8)
            quantized.launch_8bit(stored, torch.empty(kind.rows), one, out)
        else:
            quantized.launch_4bit(_packed(kind), one, out)


def _packed(kind: MatrixKind) -> Packed4bit:
    quant_type, _, nested = kind.stored.partition(" ")
    numel = kind.rows * kind.cols
    blocks = -(-numel // kind.blocksize)
    return Packed4bit(
        torch.empty((numel + 1) // 2, dtype=torch.uint8),
        torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        (kind.rows, kind.cols),
        kind.dtype,
        quant_type,
        kind.blocksize,
        NestedScales(torch.empty(256), torch.empty(-(-blocks // 256)), torch.empty(())) if nested else None,
    )


def launch_gathers(kind: MatrixKind) -> None:
    """Gather the gradient at the deltas by every method and with every tile that a plan may choose."""
    indices = kind.index_set()
    a, b = (torch.empty(_TOKENS, width, dtype=kind.dtype) for width in (kind.rows, kind.cols))
    for method, shape in [("entries", None), *(("compact", shape) for shape in TILE_SHAPES)]:
        plan = plan_outer(indices, kind.rows, kind.cols, _TOKENS, kind.dtype, method, tile_shape=shape)
        outer.gather_outer(a, b, indices, plan)


def launch_selection(kind: MatrixKind) -> None:
    """Choose candidates."""
    a, b = (torch.zeros(_FEW_TOKENS, width, dtype=kind.dtype) for width in (kind.rows, kind.cols))
    select.topk_outer(a, b, min(kind.k, kind.rows * kind.cols))


def launch_momentum(kind: MatrixKind) -> None:
    """Take the gradient into SM3's accumulators."""
    indices = kind.index_set()
    momentum.sm3_accumulate_(torch.empty(kind.rows), torch.empty(kind.cols), indices, torch.empty(indices.numel()))


def launch_all(kind: MatrixKind) -> None:
    """Every launch that training a matrix of this kind can make."""
    for launch in (launch_folds, launch_gathers, launch_selection, launch_momentum):
        launch(kind)
