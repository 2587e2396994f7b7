"""Computes ``a.T @ b`` in blocks of rows, and gathers selected entries by a plan, in plain PyTorch.

Tests compare the Triton kernels with it, and float64 operands, for which there are no kernels, run here on a GPU too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .fold import accumulation_dtype
from .index_set import row_bounds, rows_and_columns
from .outer_plan import OuterPlan, Tiles, dense_block_rows

# Products of two columns that the entries method holds at a time.
_ENTRY_PRODUCTS = 1 << 20


def check_operands(a: Tensor, b: Tensor) -> None:
    """Raise a ValueError unless the product ``a.T @ b`` exists."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[0]:
        raise ValueError(f"a and b must be [N, rows] and [N, cols], got {tuple(a.shape)} and {tuple(b.shape)}")


def check_planned(a: Tensor, b: Tensor, indices: Tensor, plan: OuterPlan) -> None:
    """Raise a ValueError unless the plan was made for operands of these shapes and as many indices."""
    check_operands(a, b)
    if (a.shape[1], b.shape[1]) != (plan.rows, plan.cols):
        raise ValueError(
            f"the plan is for {plan.rows} x {plan.cols}, but a and b have {a.shape[1]} and {b.shape[1]} columns; "
            "plan again"
        )
    if indices.shape != (plan.k,):
        raise ValueError(f"the plan is for {plan.k} positions, got indices of shape {tuple(indices.shape)}; plan again")


def outer_block(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b`` in the accumulation dtype, ``[columns of a, columns of b]``, for a block of columns of a."""
    dtype = accumulation_dtype(a, b)
    if a.is_cuda and a.dtype == b.dtype and a.dtype.itemsize == 2 and hasattr(torch.ops.aten.mm, "dtype"):
        # Returns the float32 sums unrounded and needs no float32 copies of the operands, unlike the general case below.
        return torch.mm(a.T, b, out_dtype=dtype)
    return a.to(dtype).T @ b.to(dtype)


def outer_row_blocks(a: Tensor, b: Tensor, block_rows: int) -> Iterator[tuple[int, Tensor]]:
    """First row and products of each block of `block_rows` rows of ``a.T @ b``, in the accumulation dtype."""
    for first in range(0, a.shape[1], block_rows):
        yield first, outer_block(a[:, first : first + block_rows], b)


def read_row_blocks(
    index_sets: Sequence[Tensor],
    shape: tuple[int, int],
    block_rows: int,
    bounds: Sequence[Sequence[int]],
    block: Callable[[int, int], Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Read the entries at sorted positions of a matrix that is computed in blocks of rows.

    Each block is computed once for all index sets, and only if a position lies in it.

    Args:
        index_sets: ``[k]`` sorted flat positions each, on one device.
        shape: rows and columns of the matrix; block_rows: rows of a block.
        bounds: the `row_bounds` of each index set for `block_rows`.
        block: computes the rows from the first to the last (exclusive) of a block.
        dtype: of the result.

    Returns:
        ``[k]`` for each index set.
    """
    rows, cols = shape
    outs = [torch.empty(indices.numel(), dtype=dtype, device=indices.device) for indices in index_sets]
    for number, first in enumerate(range(0, rows, block_rows)):
        spans = [(slots[number], slots[number + 1]) for slots in bounds]
        if all(begin == end for begin, end in spans):
            continue
        values = block(first, min(first + block_rows, rows)).flatten()
        for out, indices, (begin, end) in zip(outs, index_sets, spans, strict=True):
            out[begin:end] = values.index_select(0, indices[begin:end] - first * cols)
    return outs


def locate_entries(indices: Tensor, plan: OuterPlan) -> tuple[Tensor, Tensor]:
    """The tile in which the compact method computes each entry, and the place in the tile.

    Returns:
        ``(tile, place)``, both int64 ``[k]``: number of the tile, and row-major place in it.
    """
    high, wide = plan.layout
    tiles = plan.tiles
    row, col = rows_and_columns(indices, plan.cols)
    rank = tiles.row_rank.to(torch.int64)[row]
    # Numbered by block first, the columns of all tiles stand in one ascending row.
    keys = tiles.block.to(torch.int64).repeat_interleave(wide) * plan.cols + tiles.columns
    slot = torch.searchsorted(keys, torch.div(rank, high, rounding_mode="floor") * plan.cols + col)
    tile = torch.div(slot, wide, rounding_mode="floor")
    return tile, rank % high * wide + slot % wide


def tile_operands(tiles: Tiles, layout: Sequence[int], number: int) -> tuple[Tensor, Tensor]:
    """Row numbers and column numbers, int64, of one tile."""
    high, wide = layout
    block = int(tiles.block[number])
    rows = tiles.row_order[block * high : (block + 1) * high]
    return rows.to(torch.int64), tiles.columns[number * wide : (number + 1) * wide].to(torch.int64)


def _gather_compact(a: Tensor, b: Tensor, indices: Tensor, plan: OuterPlan) -> Tensor:
    out = torch.empty(plan.k, dtype=accumulation_dtype(a, b), device=a.device)
    tile, place = locate_entries(indices, plan)
    slots = torch.argsort(tile, stable=True)
    bounds = torch.searchsorted(tile[slots], torch.arange(plan.tiles.block.numel() + 1, device=a.device)).tolist()
    for number, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        rows, cols = tile_operands(plan.tiles, plan.layout, number)
        product = outer_block(a[:, rows], b[:, cols])
        chosen = slots[begin:end]
        out[chosen] = product.flatten()[place[chosen]]
    return out


def _gather_dense(a: Tensor, b: Tensor, indices: Tensor, plan: OuterPlan) -> Tensor:
    block_rows = dense_block_rows(plan.rows, plan.cols)
    bounds = row_bounds(indices, plan.rows, plan.cols, block_rows).tolist()

    def block(first: int, last: int) -> Tensor:
        return outer_block(a[:, first:last], b)

    return read_row_blocks([indices], (plan.rows, plan.cols), block_rows, [bounds], block, accumulation_dtype(a, b))[0]


def _gather_entries(a: Tensor, b: Tensor, indices: Tensor, plan: OuterPlan) -> Tensor:
    dtype = accumulation_dtype(a, b)
    out = torch.empty(plan.k, dtype=dtype, device=a.device)
    size = max(1, _ENTRY_PRODUCTS // max(1, a.shape[0]))
    for begin in range(0, plan.k, size):
        row, col = rows_and_columns(indices[begin : begin + size], plan.cols)
        out[begin : begin + size] = (a[:, row].to(dtype) * b[:, col].to(dtype)).sum(0)
    return out


_EXECUTORS = {"compact": _gather_compact, "dense": _gather_dense, "entries": _gather_entries}


def gather_by_plan(a: Tensor, b: Tensor, indices: Tensor, plan: OuterPlan) -> Tensor:
    """`gather_planned` in plain PyTorch, on any device and in any floating dtype."""
    check_planned(a, b, indices, plan)
    return _EXECUTORS[plan.method](a, b, indices, plan)
