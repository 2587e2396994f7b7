"""Launches the kernels of the sparse gradient gather that an `OuterPlan` asks for.

Block shapes follow from dtype and plan, never from a timing: another shape would round otherwise, and two runs would
differ.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..dispatch import interpreting, tf32_allowed
from ..index_set import row_bounds_of
from ..outer_plan import BUSY_PROGRAMS, OuterPlan, token_splits
from ..outer_products import check_planned, gather_by_plan
from .outer_kernels import (
    dense_entries_kernel,
    entry_dots_kernel,
    pick_entries_kernel,
    tile_products_kernel,
    token_major_kernel,
)

# Tokens per step of the kernels that read token-major copies, and per block of the one that makes them.
_TOKENS = 64
# Tiles computed before their entries are picked: at most this many bytes, which stay in an H100's L2 cache.
_WORKSPACE_BYTES = 32 << 20
_PICK_BLOCK = 512
# Of the dense gather; without matrix units a large tile does not fit the registers.
_DENSE_TILE, _DENSE_TILE_WITHOUT_UNITS = (128, 128), (64, 64)
_DOT_BLOCK = 16


def token_major(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of x in which the tokens of one column are consecutive.

    Args:
        x: ``[N, width]``, any strides.
        dtype: of the result, at least as wide as x's.

    Returns:
        ``[width, padded]``, where padded is N rounded up to a multiple of 64; zero from N on. x itself, transposed, if
        it is laid out so already.
    """
    tokens, width = x.shape
    padded = triton.cdiv(tokens, _TOKENS) * _TOKENS
    aligned = x.stride(0) == 1 and x.stride(1) % _TOKENS == 0
    if aligned and padded == tokens and x.dtype == dtype and x.data_ptr() % 16 == 0:
        return x.T
    out = torch.empty(width, padded, dtype=dtype, device=x.device)
    grid = (padded // _TOKENS, triton.cdiv(width, _TOKENS))
    token_major_kernel[grid](x, out, tokens, width, padded, x.stride(0), x.stride(1), BLOCK=_TOKENS, num_warps=4)
    return out


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"


def _gather_compact(a: Tensor, b: Tensor, indices: Tensor, plan: OuterPlan, out: Tensor) -> None:
    """Compute the plan's tiles into a workspace, as many as fit it, and pick their entries from there."""
    high, wide = plan.layout
    tiles = plan.tiles
    total, padded = tiles.block.numel(), a.shape[1]
    splits = token_splits(total, a.shape[1])
    tokens_per_split = triton.cdiv(padded // _TOKENS, splits) * _TOKENS
    splits = triton.cdiv(padded, tokens_per_split)
    size = max(1, min(total, _WORKSPACE_BYTES // (4 * splits * high * wide)))
    products = torch.empty(splits * size * high * wide, dtype=torch.float32, device=a.device)
    half, precision = a.dtype.itemsize == 2, _precision(a.dtype)
    for first in range(0, total, size):
        count = min(size, total - first)
        tile_products_kernel[(count, splits)](
            a,
            b,
            tiles.row_order,
            tiles.block,
            tiles.columns,
            products,
            first,
            a.stride(0),
            b.stride(0),
            padded,
            tokens_per_split,
            HIGH=high,
            WIDE=wide,
            TOKENS=64 if half else 32,
            PRECISION=precision,
            # Triton's interpreter multiplies the bits of bfloat16 operands.
            WIDEN=interpreting() and a.dtype == torch.bfloat16,
            num_warps=8 if high * wide > 64 * 128 else 4,
            # Without matrix instructions products take longer than the next operands; a third stage spills registers.
            num_stages=3 if half or precision == "tf32" else 2,
        )
        pick_entries_kernel[(triton.cdiv(plan.k, _PICK_BLOCK),)](
            indices,
            tiles.row_rank,
            tiles.first_tile,
            tiles.columns,
            products,
            out,
            plan.k,
            plan.cols,
            first,
            count,
            splits,
            count * high * wide,
            (math.ceil(plan.cols / wide) * wide).bit_length(),
            HIGH=high,
            WIDE=wide,
            BLOCK=_PICK_BLOCK,
            num_warps=4,
        )


def _gather_entries(a: Tensor, b: Tensor, indices: Tensor, plan: OuterPlan, out: Tensor) -> None:
    entry_dots_kernel[(triton.cdiv(plan.k, _DOT_BLOCK),)](
        a,
        b,
        indices,
        out,
        plan.k,
        plan.cols,
        a.stride(0),
        b.stride(0),
        a.shape[1],
        BLOCK=_DOT_BLOCK,
        TOKENS=_TOKENS,
        num_warps=4 if a.dtype.itemsize == 2 else 8,  # as many bytes per thread
    )


def _gather_dense(a: Tensor, b: Tensor, indices: Tensor, plan: OuterPlan, out: Tensor) -> None:
    """Compute every tile of the product that holds entries, and pick them from it."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    units = dtype.itemsize == 2 or _precision(dtype) == "tf32"
    high, wide = _DENSE_TILE if units else _DENSE_TILE_WITHOUT_UNITS
    a, b = a.to(dtype), b.to(dtype)
    across = triton.cdiv(plan.cols, wide)
    tiles = triton.cdiv(plan.rows, high) * across
    programs = min(tiles, BUSY_PROGRAMS)
    dense_entries_kernel[(programs,)](
        a,
        b,
        indices,
        row_bounds_of(indices, plan.rows, plan.cols),
        torch.empty(programs * high * wide, dtype=torch.float32, device=a.device),
        out,
        a.shape[0],
        plan.rows,
        plan.cols,
        *a.stride(),
        *b.stride(),
        across,
        tiles,
        min(plan.k, plan.cols).bit_length(),
        HIGH=high,
        WIDE=wide,
        TOKENS=64 if dtype.itemsize == 2 else 32 if units else 16,
        PRECISION=_precision(dtype),
        # Triton's interpreter multiplies the bits of bfloat16 operands.
        WIDEN=interpreting() and dtype == torch.bfloat16,
        num_warps=8,
        num_stages=3,
    )


class _Copies(threading.local):
    """The last two token-major copies, with what they were made of."""

    def __init__(self) -> None:
        self.kept: list[tuple[tuple[Any, ...], StorageWeakRef, Tensor]] = []


_copies = _Copies()


def _shared_copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`token_major`, made once for layers that share an input, such as query, key and value.

    In a backward pass they are given other tensors of the same memory and version.
    """
    storage = x.untyped_storage()
    key = (storage._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype, dtype, x._version)
    kept = [entry for entry in _copies.kept if not entry[1].expired()]
    found = next((entry for entry in kept if entry[0] == key), None)
    if found is None:
        found = key, StorageWeakRef(storage), token_major(x, dtype)
    _copies.kept = [found, *(entry for entry in kept if entry is not found)][:2]
    return found[2]


def gather_outer_sets(a: Tensor, b: Tensor, index_sets: Sequence[Tensor], plans: Sequence[OuterPlan]) -> list[Tensor]:
    """`gather_planned` for several index sets of one product; the token-major copies are made once.

    Args:
        a: ``[N, rows]``; b: ``[N, cols]``; bfloat16, float16 or float32, any strides, N may be 0. float64 runs in
            PyTorch.
        index_sets: each int32 or int64 ``[k]``.
        plans: one for each index set.

    Returns:
        Each ``[k]`` float32 (float64 if an operand has it).
    """
    for indices, plan in zip(index_sets, plans, strict=True):
        check_planned(a, b, indices, plan)
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.detach(), b.detach()
    if dtype == torch.float64:
        return [gather_by_plan(a, b, indices, plan) for indices, plan in zip(index_sets, plans, strict=True)]
    outs = []
    with torch.cuda.device_of(a):
        for indices, plan in zip(index_sets, plans, strict=True):
            if a.shape[0] == 0 or plan.k == 0:
                outs.append(torch.zeros(plan.k, dtype=torch.float32, device=a.device))
                continue
            out = torch.empty(plan.k, dtype=torch.float32, device=a.device)
            if plan.method == "dense":
                _gather_dense(a, b, indices.contiguous(), plan, out)
            else:
                gather = _gather_compact if plan.method == "compact" else _gather_entries
                gather(_shared_copy(a, dtype), _shared_copy(b, dtype), indices.contiguous(), plan, out)
            outs.append(out)
    return outs


def gather_outer(a: Tensor, b: Tensor, indices: Tensor, plan: OuterPlan) -> Tensor:
    """`gather_outer_sets` for one index set."""
    return gather_outer_sets(a, b, [indices], [plan])[0]
