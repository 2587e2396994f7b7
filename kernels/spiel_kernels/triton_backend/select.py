"""Selects the exact top k of ``|a.T @ b|`` on a GPU in row blocks, without waiting for the device.

A sample of rows gives a bound that a little more than k entries reach. Row blocks of the product are computed once, and
the entries that reach the bound are appended to a pool. The top k of the pool are the top k of all if the pool holds at
least k entries and lost none. If not (the sample misled, or very many entries are equal), the blocks are computed again
for the selection that waits for the device after each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..outer_plan import dense_block_rows
from ..outer_products import outer_block, outer_row_blocks
from ..streaming import best_mask, topk_of_blocks

# Rows in the sample, at least, and entries, as far as that allows. Rows are drawn evenly from all of them sorted by the
# norm of their column of a: with row and column norms spread over several decades and k between 0.25% and 3% of the
# matrix, 0.99 to 1.16 of the entries asked for then reached the bound (0.5 to 1.8 with rows drawn at random).
_SAMPLE_ROWS = 128
_SAMPLE_ENTRIES = 1 << 20
# The bound is set for so many entries per entry wanted, and the pool has room for so many.
_AIM = 1.2
_ROOM = 1.6
# Added to these numbers, as a small k makes a small sample.
_AIM_SPARE = 32
_ROOM_SPARE = 1 << 16
_BLOCK = 2048


@triton.jit
def _count_kernel(
    product,  # [numel] float32
    bound,  # [1] float32, not negative
    counts,  # [programs] int32, written
    numel,
    BLOCK: tl.constexpr,
):
    slots = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    score = tl.abs(tl.load(product + slots, mask=slots < numel, other=0.0))
    # False for NaN.
    reached = (score >= tl.load(bound)) & (score > 0.0)
    tl.store(counts + tl.program_id(0), tl.sum(reached.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["capacity", "first"])
def _append_kernel(
    product,  # [numel] float32
    bound,  # [1] float32, not negative
    starts,  # [programs] int64: slot in the pool of each program's first entry
    pool_values,  # [capacity] float32, changed
    pool_positions,  # [capacity] int64, changed
    numel,
    capacity,
    first,  # position of the first product
    BLOCK: tl.constexpr,
):
    slots = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(product + slots, mask=slots < numel, other=0.0)
    score = tl.abs(value)
    reached = (score >= tl.load(bound)) & (score > 0.0)
    place = tl.load(starts + tl.program_id(0)) + tl.cumsum(reached.to(tl.int32), axis=0) - 1
    kept = reached & (place < capacity)
    tl.store(pool_values + place, value, mask=kept)
    tl.store(pool_positions + place, slots + first, mask=kept)


@dataclass
class Pool:
    """Entries that reached the bound, by ascending position. Entries beyond its room are counted, but lost.

    Args:
        values: float32 ``[capacity]``, zero where free; positions: int64 ``[capacity]``.
        count: int64 ``[1]`` on the device, of all entries that reached the bound.
    """

    values: Tensor
    positions: Tensor
    count: Tensor

    @staticmethod
    def empty(capacity: int, device: torch.device) -> Pool:
        values = torch.zeros(capacity, dtype=torch.float32, device=device)
        positions = torch.zeros(capacity, dtype=torch.int64, device=device)
        return Pool(values, positions, torch.zeros(1, dtype=torch.int64, device=device))

    def append(self, product: Tensor, first: int, bound: Tensor) -> None:
        """Add the entries of a contiguous block of products whose size reaches the bound; zeros and NaN never do."""
        numel = product.numel()
        grid = (triton.cdiv(numel, _BLOCK),)
        counts = torch.empty(grid, dtype=torch.int32, device=product.device)
        _count_kernel[grid](product, bound, counts, numel, BLOCK=_BLOCK, num_warps=4)
        ends = counts.cumsum(0, dtype=torch.int64) + self.count
        _append_kernel[grid](
            product,
            bound,
            ends - counts,
            self.values,
            self.positions,
            numel,
            self.values.numel(),
            first,
            BLOCK=_BLOCK,
            num_warps=4,
        )
        self.count = ends[-1:]


def sampled_bound(a: Tensor, b: Tensor, k: int) -> Tensor:
    """float32 ``[1]``: a score that somewhat more than k entries reach, estimated from a sample of rows."""
    rows, cols = a.shape[1], b.shape[1]
    wanted = min(rows, max(_SAMPLE_ROWS, _SAMPLE_ENTRIES // cols))
    stride = rows // wanted
    by_norm = torch.linalg.vector_norm(a, dim=0, dtype=torch.float32).argsort(stable=True)
    sample = by_norm[stride // 2 :: stride]
    scores = outer_block(a.index_select(1, sample), b).abs().flatten()
    scores = torch.where(scores > 0, scores, 0.0)
    rank = math.ceil(_AIM * k * sample.numel() / rows) + _AIM_SPARE
    if rank >= scores.numel():
        return torch.zeros(1, dtype=torch.float32, device=a.device)
    return torch.topk(scores, rank, sorted=False).values.min().view(1)


def _row_blocks(a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Position of the first entry, and the products, of each row block of ``a.T @ b``."""
    blocks = outer_row_blocks(a, b, dense_block_rows(a.shape[1], b.shape[1]))
    return ((first * b.shape[1], block) for first, block in blocks)


def _topk_waiting(a: Tensor, b: Tensor, k: int) -> Tensor:
    """`topk_outer` in a way that waits for the device after each block."""
    return topk_of_blocks(((first, block.abs_()) for first, block in _row_blocks(a, b)), k, a.device)


def largest_outer(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest ``|a.T @ b|``, exact with respect to the products as computed in float32, without waiting.

    Holds a row block of at most 16 MiB, a sample of rows of 4 MiB (128 rows, if that is more) and 12 bytes for 1.6
    entries per entry wanted.

    Args:
        a: ``[N, rows]``; b: ``[N, cols]``; bfloat16, float16 or float32, any strides, N at least 1.
        k: how many, at least 1 and at most ``rows * cols``; entries that are zero or NaN are never chosen.

    Returns:
        ``(positions, values, found)``: int64 ``[k]`` flat positions in ``[rows, cols]``, ascending, and the entries
        there, float32 ``[k]``. ``found``, int64 ``[2]`` on the device: how many of the positions hold (after them
        stands the last position of the matrix, with zeros), and 0 if the sample misled, so that these are not the k
        largest.
    """
    a, b = a.detach(), b.detach()
    total = a.shape[1] * b.shape[1]
    capacity = min(total, int(_ROOM * k) + _ROOM_SPARE)
    with torch.cuda.device_of(a):
        fits = capacity == total
        bound = torch.zeros(1, dtype=torch.float32, device=a.device) if fits else sampled_bound(a, b, k)
        pool = Pool.empty(capacity, a.device)
        for first, block in _row_blocks(a, b):
            pool.append(block, first, bound)
        best = best_mask(pool.values.abs(), k).logical_and_(pool.values != 0)
        # The last place takes what was not chosen.
        place = torch.where(best, best.cumsum(0) - 1, k)
        positions = torch.full((k + 1,), total - 1, dtype=torch.int64, device=a.device)
        positions.scatter_(0, place, pool.positions)
        values = torch.zeros(k + 1, dtype=torch.float32, device=a.device).scatter_(0, place, pool.values)
        lost = (pool.count[0] > capacity) | ((bound[0] > 0) & (pool.count[0] < k))
        return positions[:k], values[:k], torch.stack([best.sum(), lost.logical_not().long()])


def topk_outer(a: Tensor, b: Tensor, k: int) -> Tensor:
    """`largest_outer` that waits for the device at the end, and after every block where the sample misled.

    Args:
        a, b: also float64, for which it waits after every block; N may be 0.
        k: how many, at least 0.

    Returns:
        int64 ``[<= k]`` flat positions in ``[rows, cols]``, ascending; ties go to the lowest position.
    """
    k = min(k, a.shape[1] * b.shape[1])
    if k <= 0 or a.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64, device=a.device)
    if torch.float64 in (a.dtype, b.dtype):
        return _topk_waiting(a.detach(), b.detach(), k)
    positions, _, found = largest_outer(a, b, k)
    count, sound = found.tolist()
    return positions[:count] if sound else _topk_waiting(a.detach(), b.detach(), k)
