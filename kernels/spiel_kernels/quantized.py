"""Dequantizes a weight and adds sparse deltas to it, in one pass into a workspace.

An adapted entry is ``round(W0 + deltas)``: W0 as bitsandbytes dequantizes it, which for 4 bits means rounded to the
dtype it was quantized from; the sum in float32; rounded once to the dtype of the output. Every other entry is W0, cast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .dispatch import operation, runs_triton
from .fold import Deltas, adapted_entries, deltas_between, sum_entries, union_positions, write_entries
from .quantized_layout import (
    NestedScales,
    Packed4bit,
    block_scales,
    dequantize_4bit,
    dequantize_8bit,
    dequantize_entries_4bit,
    dequantize_entries_8bit,
)

# Elements dequantized at a time on a CPU. They stay in its cache until they are in the workspace, which is 3 to 7 times
# faster than a whole matrix at once.
CPU_BLOCK_ELEMENTS = 1 << 20


def dequantize_fold_4bit(weight: Packed4bit, deltas: Deltas, out: Tensor) -> Tensor:
    """Write a 4-bit matrix plus deltas to `out`, ``round(W0 + deltas)``.

    Args:
        weight: the matrix, on the device of all other tensors.
        deltas: pairs of ``indices`` (``[k]`` int32 or int64, sorted, unique, in range) and ``values`` (``[k]``
            floating), of any strides; several pairs add up, in the order given. One pair is the fast case.
        out: ``[rows, cols]`` floating, contiguous; overwritten.

    Returns:
        `out`.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if tuple(out.shape) != tuple(weight.shape):
        raise ValueError(f"out must have the weight's shape {tuple(weight.shape)}, got {tuple(out.shape)}")
    nested = weight.nested
    _fold_4bit(
        weight.packed,
        weight.absmax,
        nested.code if nested is not None else None,
        nested.absmax if nested is not None else None,
        nested.offset if nested is not None else None,
        nested.blocksize if nested is not None else 0,
        weight.quant_type,
        weight.blocksize,
        weight.dtype,
        [indices for indices, _ in deltas],
        [values for _, values in deltas],
        out,
    )
    return out


def dequantize_fold_8bit(weight: Tensor, scales: Tensor, deltas: Deltas, out: Tensor) -> Tensor:
    """Write a matrix of 8-bit rows plus deltas to `out`, ``round(W0 + deltas)``.

    Args:
        weight: ``[rows, cols]`` int8; scales: ``[rows]`` float32.
        deltas, out: as in `dequantize_fold_4bit`.

    Returns:
        `out`.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _fold_8bit(weight, scales, [indices for indices, _ in deltas], [values for _, values in deltas], out)
    return out


def _check(out: Tensor, indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if out.dim() != 2 or not out.is_contiguous() or not out.is_floating_point():
        raise ValueError(
            f"out must be a contiguous floating matrix, got {out.dtype} of shape {tuple(out.shape)} with strides "
            f"{out.stride()}"
        )
    if len(indices) != len(values):
        raise ValueError(f"every delta needs indices and values, got {len(indices)} and {len(values)}")
    for index, value in zip(indices, values, strict=True):
        if index.dim() != 1 or index.shape != value.shape:
            raise ValueError(
                "indices and values of a delta must be one-dimensional and equally long, got shapes "
                f"{tuple(index.shape)} and {tuple(value.shape)}"
            )
        if index.dtype != torch.int64 and (index.dtype != torch.int32 or out.numel() >= 2**31):
            raise ValueError(f"indices must be int64, or int32 below 2**31 elements, got {index.dtype}")


def _fold_4bit_fake(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_blocksize: int,
    quant_type: str,
    blocksize: int,
    dtype: torch.dtype,
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    out: Tensor,
) -> None:
    _check(out, indices, values)


@operation(
    "dequantize_fold_4bit(Tensor packed, Tensor absmax, Tensor? nested_code, Tensor? nested_absmax, "
    "Tensor? nested_offset, int nested_blocksize, str quant_type, int blocksize, ScalarType dtype, Tensor[] indices, "
    "Tensor[] values, Tensor(a!) out) -> ()",
    _fold_4bit_fake,
)
def _fold_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_blocksize: int,
    quant_type: str,
    blocksize: int,
    dtype: torch.dtype,
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    out: Tensor,
) -> None:
    _check(out, indices, values)
    nested = None
    if nested_code is not None and nested_absmax is not None and nested_offset is not None:
        nested = NestedScales(nested_code, nested_absmax, nested_offset, nested_blocksize)
    shape = (out.shape[0], out.shape[1])
    weight = Packed4bit(packed, absmax, shape, dtype, quant_type, blocksize, nested)
    deltas = list(zip(indices, values, strict=True))
    if not runs_triton(out, packed):
        blocks = ((first, dequantize_4bit(rows)) for first, rows in row_blocks_4bit(weight))
        fold_row_blocks(blocks, deltas, out)
        return
    from .triton_backend.quantized import launch_4bit

    one, rest = _one_fast_delta(deltas)
    launch_4bit(weight, one, out)
    if rest:
        _fold_entries(lambda positions: dequantize_entries_4bit(weight, positions), rest, out)


def _fold_8bit_fake(
    weight: Tensor, scales: Tensor, indices: Sequence[Tensor], values: Sequence[Tensor], out: Tensor
) -> None:
    _check(out, indices, values)
    if weight.dtype != torch.int8 or weight.shape != out.shape:
        raise ValueError(
            f"weight must be int8 of out's shape {tuple(out.shape)}, got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    if scales.dtype != torch.float32 or scales.shape != out.shape[:1]:
        raise ValueError(
            f"scales must be float32 of shape ({out.shape[0]},), got {scales.dtype} of shape {tuple(scales.shape)}"
        )


@operation(
    "dequantize_fold_8bit(Tensor weight, Tensor scales, Tensor[] indices, Tensor[] values, Tensor(a!) out) -> ()",
    _fold_8bit_fake,
)
def _fold_8bit(
    weight: Tensor, scales: Tensor, indices: Sequence[Tensor], values: Sequence[Tensor], out: Tensor
) -> None:
    _fold_8bit_fake(weight, scales, indices, values, out)
    deltas = list(zip(indices, values, strict=True))
    if not runs_triton(out, weight):
        blocks = (
            (first, dequantize_8bit(weight[first:last], scales[first:last]))
            for first, last in row_ranges(*out.shape, out.device)
        )
        fold_row_blocks(blocks, deltas, out)
        return
    from .triton_backend.quantized import launch_8bit

    one, rest = _one_fast_delta(deltas)
    launch_8bit(weight, scales, one, out)
    if rest:
        _fold_entries(lambda positions: dequantize_entries_8bit(weight, scales, positions), rest, out)


def _one_fast_delta(deltas: Deltas) -> tuple[tuple[Tensor, Tensor] | None, list[tuple[Tensor, Tensor]]]:
    """The delta that the kernel adds, if there is one of 32 bits or less, and the deltas to be added after it."""
    present = [pair for pair in deltas if pair[0].numel()]
    if len(present) == 1 and present[0][1].dtype != torch.float64:
        return present[0], []
    return None, present


def _fold_entries(read: Callable[[Tensor], Tensor], deltas: Deltas, out: Tensor) -> None:
    """Add deltas to entries read from the quantized weight; entries of `out` may have been rounded to its dtype."""
    positions = union_positions(deltas)
    write_entries(out, positions, sum_entries(read(positions), positions, deltas).to(out.dtype))


def fold_row_blocks(blocks: Iterable[tuple[int, Tensor]], deltas: Deltas, out: Tensor) -> Tensor:
    """Write blocks of rows to `out` and add the deltas to each one at once, while it is in the cache.

    Args:
        blocks: pairs of the first row and ``[rows of the block, cols]`` floating; together the whole matrix.
        deltas: pairs of sorted, unique ``indices`` ``[k]`` and ``values`` ``[k]``.
        out: ``[rows, cols]`` floating, contiguous; overwritten.

    Returns:
        `out`.
    """
    cols = out.shape[1]
    deltas = [(indices.contiguous(), values) for indices, values in deltas if indices.numel()]
    for first, block in blocks:
        target = out[first : first + block.shape[0]]
        target.copy_(block)
        local = deltas
        if block.shape[0] != out.shape[0]:
            local = deltas_between(deltas, first * cols, first * cols + block.numel())
        if local:
            positions, sums = adapted_entries(block, local)
            write_entries(target, positions, sums.to(out.dtype))
    return out


def row_ranges(rows: int, cols: int, device: torch.device, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of blocks that fit a CPU's cache; elsewhere one block, to spare launches.

    Args:
        multiple: every block but the last has a multiple of so many elements.
    """
    size = rows
    if device.type == "cpu":
        step = multiple // math.gcd(multiple, cols)
        size = step * max(1, CPU_BLOCK_ELEMENTS // max(1, cols * step))
    for first in range(0, rows, max(1, size)):
        yield first, min(first + size, rows)


def row_blocks_4bit(weight: Packed4bit) -> Iterator[tuple[int, Packed4bit]]:
    """Blocks of rows of a matrix, each with the number of its first row; the blocks' scales are float32."""
    rows, cols = weight.shape
    scales, size = block_scales(weight), weight.blocksize
    for first, last in row_ranges(rows, cols, weight.packed.device, size):
        begin, end = first * cols, last * cols
        packed, absmax = weight.bytes[begin // 2 : (end + 1) // 2], scales[begin // size : -(-end // size)]
        yield first, Packed4bit(packed, absmax, (last - first, cols), weight.dtype, weight.quant_type, size)
