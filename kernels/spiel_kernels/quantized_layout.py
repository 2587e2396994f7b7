"""Stores and dequantizes matrices in the 4-bit and 8-bit formats of bitsandbytes.

4 bits (NF4, FP4): two elements to a byte, the first in the high nibble, each an index into a table of 16 values; every
`blocksize` consecutive elements of the flattened matrix share a scale, their largest magnitude, which may itself be
stored in 8 bits (double quantization). 8 bits: one signed byte per element, one scale per row.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

CODES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sign * level / 12 for sign in (1, -1) for level in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
RECIPROCAL_127 = 7.874015718698502e-3  # the constant of bitsandbytes, not quite 1 / 127


@functools.cache
def code_table(quant_type: str, device: torch.device) -> Tensor:
    """The 16 values of a 4-bit type, float32."""
    with torch.inference_mode(False):
        return torch.tensor(CODES[quant_type], dtype=torch.float32, device=device)


@dataclass(frozen=True)
class NestedScales:
    """How 8-bit scales are dequantized: ``code[scale] * absmax[block of the scale] + offset``, each step in float32.

    Attributes:
        code: ``[256]`` float32.
        absmax: ``[ceil(number of scales / blocksize)]`` float32.
        offset: ``[]`` float32.
        blocksize: scales that share an entry of `absmax`.
    """

    code: Tensor
    absmax: Tensor
    offset: Tensor
    blocksize: int = 256


@dataclass(frozen=True)
class Packed4bit:
    """A matrix of 4-bit elements.

    Attributes:
        packed: the bytes, of any shape and dtype, contiguous.
        absmax: ``[ceil(numel / blocksize)]`` scales, float32, or uint8 together with `nested`.
        shape: rows and columns of the matrix.
        dtype: of the matrix before it was quantized, to which dequantizing rounds: float32, bfloat16 or float16.
        quant_type: "nf4" or "fp4".
        blocksize: elements that share a scale.
        nested: how 8-bit scales are dequantized; None for float32 scales.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    quant_type: str = "nf4"
    blocksize: int = 64
    nested: NestedScales | None = None

    def __post_init__(self) -> None:
        """Raise a ValueError that names the first attribute that is invalid or does not fit the others."""
        if self.quant_type not in CODES:
            raise ValueError(f"quant_type must be one of {', '.join(CODES)}, got {self.quant_type!r}")
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {self.blocksize}")
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype}")
        held, needed = self.packed.numel() * self.packed.element_size(), (self.numel + 1) // 2
        if held < needed or not self.packed.is_contiguous():
            raise ValueError(
                f"packed must hold {needed} contiguous bytes for shape {tuple(self.shape)}, got {held} with strides "
                f"{self.packed.stride()}"
            )
        dtype = torch.float32 if self.nested is None else torch.uint8
        if self.absmax.dtype != dtype or self.absmax.shape != (self.blocks,):
            raise ValueError(
                f"absmax must be {dtype} of shape ({self.blocks},), got {self.absmax.dtype} of shape "
                f"{tuple(self.absmax.shape)}"
            )
        if self.nested is not None:
            self._check_nested(self.nested)

    def _check_nested(self, nested: NestedScales) -> None:
        sizes = (nested.code.numel(), nested.absmax.numel(), nested.offset.numel())
        wanted = (256, -(-self.blocks // nested.blocksize), 1)
        dtypes = {nested.code.dtype, nested.absmax.dtype, nested.offset.dtype}
        if sizes != wanted or dtypes != {torch.float32}:
            raise ValueError(
                f"nested code, absmax and offset must be float32 with {wanted} elements, got {sizes} elements of "
                f"{', '.join(sorted(map(str, dtypes)))}"
            )

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        """How many scales there are."""
        return -(-self.numel // self.blocksize)

    @property
    def bytes(self) -> Tensor:
        """The packed bytes, uint8 ``[>= ceil(numel / 2)]``."""
        return self.packed.view(-1).view(torch.uint8)


def block_scales(weight: Packed4bit) -> Tensor:
    """The scales of a matrix in float32, ``[blocks]``."""
    nested = weight.nested
    if nested is None:
        return weight.absmax
    return _scale_blocks_(nested.code[weight.absmax.to(torch.int64)], nested.absmax, nested.blocksize) + nested.offset


def _scale_blocks_(flat: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    """Multiply every block of ``[n]`` by its scale, in place; the last block may be short."""
    full = flat.numel() // blocksize
    head, tail = flat[: full * blocksize], flat[full * blocksize :]
    head.view(full, blocksize).mul_(scales[:full, None])
    if tail.numel():
        tail.mul_(scales[full])
    return flat


def dequantize_4bit(weight: Packed4bit) -> Tensor:
    """The matrix that the packed bytes stand for, ``[rows, cols]`` in `weight.dtype`."""
    packed = weight.bytes[: (weight.numel + 1) // 2]
    nibbles = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: weight.numel]
    flat = code_table(weight.quant_type, packed.device)[nibbles.to(torch.int64)]
    return _scale_blocks_(flat, block_scales(weight), weight.blocksize).to(weight.dtype).view(weight.shape)


def dequantize_entries_4bit(weight: Packed4bit, positions: Tensor) -> Tensor:
    """Single entries of `dequantize_4bit`: ``[k]`` in `weight.dtype`, for flat integer positions ``[k]``."""
    positions = positions.to(torch.int64)
    packed = weight.bytes[positions >> 1]
    nibbles = torch.where(positions % 2 == 0, packed >> 4, packed & 15).to(torch.int64)
    blocks = torch.div(positions, weight.blocksize, rounding_mode="floor")
    scales, nested = weight.absmax[blocks], weight.nested
    if nested is not None:
        outer = torch.div(blocks, nested.blocksize, rounding_mode="floor")
        scales = nested.code[scales.to(torch.int64)] * nested.absmax[outer] + nested.offset
    return (code_table(weight.quant_type, packed.device)[nibbles] * scales).to(weight.dtype)


def dequantize_8bit(weight: Tensor, scales: Tensor) -> Tensor:
    """The matrix that 8-bit rows stand for.

    Args:
        weight: ``[rows, cols]`` int8; scales: ``[rows]`` float32, the largest magnitude of each row.

    Returns:
        ``[rows, cols]`` float32.
    """
    return weight.to(torch.float32).mul_(scales[:, None]).mul_(RECIPROCAL_127)


def dequantize_entries_8bit(weight: Tensor, scales: Tensor, positions: Tensor) -> Tensor:
    """Single entries of `dequantize_8bit`: float32 ``[k]`` for flat integer positions ``[k]``."""
    positions = positions.to(torch.int64)
    rows = torch.div(positions, weight.shape[1], rounding_mode="floor")
    return weight.flatten()[positions].to(torch.float32).mul_(scales[rows]).mul_(RECIPROCAL_127)


def quantize_4bit(weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, nested: bool = True) -> Packed4bit:
    """Quantize a matrix to 4 bits, for tests and benchmarks where bitsandbytes is missing.

    Every element gets the code nearest to it over the largest magnitude of its block. Nested scales get a code of
    evenly spaced values, where bitsandbytes has a dynamic one.

    Args:
        weight: ``[rows, cols]`` float32, bfloat16 or float16.
    """
    if quant_type not in CODES:
        raise ValueError(f"quant_type must be one of {', '.join(CODES)}, got {quant_type!r}")
    blocks = _padded_blocks(weight.float().flatten(), blocksize)
    absmax = blocks.abs().amax(1)
    levels, order = code_table(quant_type, weight.device).sort()
    scaled = (blocks / absmax.clamp(min=1e-38)[:, None]).flatten()
    nibbles = order[torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)].to(torch.uint8)
    packed = (nibbles[::2] << 4 | nibbles[1::2])[: (weight.numel() + 1) // 2]
    scales, how = _nest(absmax) if nested else (absmax, None)
    return Packed4bit(packed, scales, (weight.shape[0], weight.shape[1]), weight.dtype, quant_type, blocksize, how)


def _padded_blocks(flat: Tensor, blocksize: int) -> Tensor:
    return torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)


def _nest(absmax: Tensor) -> tuple[Tensor, NestedScales]:
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    blocks = _padded_blocks(absmax - offset, 256)
    largest = blocks.abs().amax(1)
    code = torch.linspace(-1, 1, 256, device=absmax.device)
    scaled = (blocks / largest.clamp(min=1e-38)[:, None]).flatten()[: absmax.numel()]
    return ((scaled + 1) * 127.5).round().to(torch.uint8), NestedScales(code, largest, offset)


def quantize_8bit(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a matrix to 8-bit rows, for tests and benchmarks: int8 ``[rows, cols]``, float32 scales ``[rows]``."""
    scales = weight.float().abs().amax(1)
    return (weight.float() * (127 / scales.clamp(min=1e-38))[:, None]).round().to(torch.int8), scales
