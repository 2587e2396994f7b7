"""Selected entries of ``a.T @ b`` by a plan, in plain PyTorch: the oracle of the Triton kernels, and their float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .fold import accumulation_dtype
from .outer_plan import OuterPlan, Tiles

# Products of two columns that the entries method holds at a time.
_ENTRY_PRODUCTS = 1 << 20


def check_planned(a: Tensor, b: Tensor, indices: Tensor, plan: OuterPlan) -> None:
    """Raise a ValueError unless the operands are those of the plan."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[0]:
        raise ValueError(f"a and b must be [N, rows] and [N, cols], got {tuple(a.shape)} and {tuple(b.shape)}")
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
        # Rounds nothing and copies nothing, unlike the general case below.
        return torch.mm(a.T, b, out_dtype=dtype)
    return a.to(dtype).T @ b.to(dtype)


def locate_entries(indices: Tensor, plan: OuterPlan) -> tuple[Tensor, Tensor]:
    """Where the compact method computes each entry.

    Returns:
        ``(tile, place)``, both int64 ``[k]``: number of the tile, and row-major place in it.
    """
    high, wide = plan.layout
    tiles = plan.tiles
    positions = indices.to(torch.int64)
    row = torch.div(positions, plan.cols, rounding_mode="floor")
    rank = tiles.row_rank.to(torch.int64)[row]
    # Numbered by block first, the columns of all tiles stand in one ascending row.
    keys = tiles.block.to(torch.int64).repeat_interleave(wide) * plan.cols + tiles.columns
    slot = torch.searchsorted(keys, torch.div(rank, high, rounding_mode="floor") * plan.cols + positions % plan.cols)
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
    out = torch.empty(plan.k, dtype=accumulation_dtype(a, b), device=a.device)
    block_rows, *bounds = plan.layout
    for number, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if begin == end:
            continue
        first = number * block_rows
        block = outer_block(a[:, first : first + block_rows], b)
        out[begin:end] = block.flatten().index_select(0, indices[begin:end] - first * plan.cols)
    return out


def _gather_entries(a: Tensor, b: Tensor, indices: Tensor, plan: OuterPlan) -> Tensor:
    dtype = accumulation_dtype(a, b)
    out = torch.empty(plan.k, dtype=dtype, device=a.device)
    size = max(1, _ENTRY_PRODUCTS // max(1, a.shape[0]))
    for begin in range(0, plan.k, size):
        positions = indices[begin : begin + size].to(torch.int64)
        row = torch.div(positions, plan.cols, rounding_mode="floor")
        col = positions - row * plan.cols
        out[begin : begin + size] = (a[:, row].to(dtype) * b[:, col].to(dtype)).sum(0)
    return out


_EXECUTORS = {"compact": _gather_compact, "dense": _gather_dense, "entries": _gather_entries}


def gather_by_plan(a: Tensor, b: Tensor, indices: Tensor, plan: OuterPlan) -> Tensor:
    """`gather_planned` in plain PyTorch, on any device: the oracle of the kernels, and what runs in float64."""
    check_planned(a, b, indices, plan)
    return _EXECUTORS[plan.method](a, b, indices, plan)
