"""What the kernels of a matrix's training are compiled for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

STORED = ("plain", "nf4", "nf4 nested", "fp4", "fp4 nested", "int8")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class MatrixKind:
    """The form of a weight and of what its training works on. Matrices of one kind need the same compiled kernels.

    Args:
        rows: of the weight as stored (output features of a linear layer); cols: its columns.
        dtype: of activations, output gradients and the adapted weight: bfloat16, float16 or float32.
        stored: how the base weight is stored: "plain", "nf4" or "fp4" (with " nested" if the scales are quantized too),
            or "int8".
        weight_dtype: of a plain weight, or of a 4-bit one before it was quantized; `dtype` if None.
        k: number of deltas; no kernel is compiled for a certain number.
        values: dtype of the deltas.
        blocksize: elements that share a scale of a 4-bit weight.
    """

    rows: int
    cols: int
    dtype: torch.dtype
    stored: str = "plain"
    weight_dtype: torch.dtype | None = None
    k: int = 1024
    values: torch.dtype = torch.float32
    blocksize: int = 64

    def __post_init__(self) -> None:
        """Raise a ValueError that names the first argument that does not fit."""
        if self.stored not in STORED:
            raise ValueError(f"stored must be one of {', '.join(STORED)}, got {self.stored!r}")
        if self.dtype not in _DTYPES or self.base_dtype not in _DTYPES:
            raise ValueError(
                f"dtype and weight_dtype must be bfloat16, float16 or float32, got {self.dtype} and {self.base_dtype}"
            )
        if min(self.rows, self.cols, self.k) < 1:
            raise ValueError(f"rows, cols and k must be at least 1, got {self.rows}, {self.cols} and {self.k}")

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def base_dtype(self) -> torch.dtype:
        return self.weight_dtype or self.dtype
