"""Triton kernels of the sparse gradient gather; `outer` launches them.

Operands are read token-major: a row per column of a (or b), in which consecutive tokens stand side by side. Gathering
columns of the usual layout would fetch a sector of 32 bytes for every 2 or 4 of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_at_least(
    values,  # ascending integers
    low,  # [n]: the first slot to look at
    high,  # [n]: exclusive; not above low where there is nothing to look at
    wanted,  # [n]
    steps,  # halvings that single out one slot
):
    """The first slot whose value is not below `wanted`, `high` if there is none."""
    for _ in range(steps):
        middle = (low + high) // 2
        below = (tl.load(values + middle, mask=low < high, other=0) < wanted) & (low < high)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit(do_not_specialize=["tokens"])
def token_major_kernel(
    x,  # [tokens, width] any strides
    out,  # [width, padded] contiguous, zero from `tokens` on
    tokens,
    width,
    padded,  # a multiple of BLOCK
    stride_token,
    stride_width,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (n < tokens)[:, None] & (w < width)[None, :]
    block = tl.load(x + n[:, None] * stride_token + w[None, :] * stride_width, mask=inside, other=0.0)
    turned = tl.trans(block).to(out.dtype.element_ty)
    tl.store(out + w[:, None] * padded + n[None, :], turned, mask=(w < width)[:, None])


@triton.jit(do_not_specialize=["first"])
def tile_products_kernel(
    a,  # [rows, >= padded] token-major, a row every stride_a
    b,  # [cols, >= padded] token-major
    row_order,  # [blocks * HIGH] int16 or int32
    block_of_tile,  # [tiles] int16 or int32
    columns,  # [tiles * WIDE] int16 or int32
    products,  # [splits, tiles of this launch, HIGH, WIDE] float32
    first,  # number of the first tile of this launch
    stride_a,
    stride_b,
    padded,  # tokens, a multiple of TOKENS
    tokens_per_split,  # a multiple of TOKENS
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # multiply in float32
):
    # Neighbouring programs belong to one block of rows and read the same rows of a.
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, TOKENS)
    block = tl.load(block_of_tile + first + tile).to(tl.int64)
    rows = tl.load(row_order + block * HIGH + tl.arange(0, HIGH)).to(tl.int64)
    cols = tl.load(columns + (first + tile) * WIDE + tl.arange(0, WIDE)).to(tl.int64)
    start = tl.program_id(1) * tokens_per_split
    stop = tl.minimum(start + tokens_per_split, padded)
    a_block = a + rows[:, None] * stride_a + (start + n)[None, :]
    b_block = b + cols[None, :] * stride_b + (start + n)[:, None]
    total = tl.zeros([HIGH, WIDE], dtype=tl.float32)
    for _ in range(start, stop, TOKENS):
        left = tl.load(a_block)
        right = tl.load(b_block)
        if WIDEN:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        a_block += TOKENS
        b_block += TOKENS
    base = products + (split * tl.num_programs(0) + tile) * (HIGH * WIDE)
    place = tl.arange(0, HIGH)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    tl.store(base + place, total)


@triton.jit(do_not_specialize=["k", "matrix_cols", "first", "count", "splits", "split_stride", "steps"])
def pick_entries_kernel(
    indices,  # [k] int32 or int64
    row_rank,  # [rows] int16 or int32
    first_tile,  # [blocks + 1] int32
    columns,  # [tiles * WIDE] int16 or int32, ascending within a block
    products,  # [splits, count, HIGH, WIDE] float32: tiles first .. first + count
    out,  # [k] float32; entries of other tiles stay as they are
    k,
    matrix_cols,
    first,
    count,
    splits,
    split_stride,  # count * HIGH * WIDE
    steps,  # halvings that single out one of a block's columns
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slots = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slots < k
    # Divided in the width of the indices: a division of 64 bits takes several times as long.
    position = tl.load(indices + slots, mask=inside, other=0)
    row = position // matrix_cols
    col = (position - row * matrix_cols).to(tl.int32)
    rank = tl.load(row_rank + row, mask=inside, other=0).to(tl.int32)
    block = rank // HIGH
    low = tl.load(first_tile + block, mask=inside, other=0) * WIDE
    high = tl.load(first_tile + block + 1, mask=inside, other=0) * WIDE
    # The first of the block's columns that is not below col, which is col itself.
    low = first_at_least(columns, low, high, col, steps)
    tile = low // WIDE - first
    here = inside & (tile >= 0) & (tile < count)
    place = (tile.to(tl.int64) * HIGH + rank % HIGH) * WIDE + low % WIDE
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in range(splits):
        total += tl.load(products + split * split_stride + place, mask=here, other=0.0)
    tl.store(out + slots, total, mask=here)


@triton.jit(do_not_specialize=["k", "matrix_cols"])
def entry_dots_kernel(
    a,  # [rows, >= padded] token-major, a row every stride_a
    b,  # [cols, >= padded] token-major
    indices,  # [k] int32 or int64
    out,  # [k] float32
    k,
    matrix_cols,
    stride_a,
    stride_b,
    padded,  # tokens, a multiple of TOKENS
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    # Sorted positions of one row follow each other, so that most rows of a come from the nearest cache.
    slots = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slots < k
    position = tl.load(indices + slots, mask=inside, other=0)
    row = position // matrix_cols
    col = (position - row * matrix_cols).to(tl.int64)
    row = row.to(tl.int64)
    n = tl.arange(0, TOKENS)
    a_block = a + row[:, None] * stride_a + n[None, :]
    b_block = b + col[:, None] * stride_b + n[None, :]
    total = tl.zeros([BLOCK, TOKENS], dtype=tl.float32)
    for _ in range(0, padded, TOKENS):
        left = tl.load(a_block, mask=inside[:, None], other=0.0).to(tl.float32)
        right = tl.load(b_block, mask=inside[:, None], other=0.0).to(tl.float32)
        total += left * right
        a_block += TOKENS
        b_block += TOKENS
    tl.store(out + slots, tl.sum(total, axis=1), mask=inside)


@triton.jit(do_not_specialize=["tokens", "rows", "cols", "across", "tiles", "steps"])
def dense_entries_kernel(
    a,  # [tokens, rows] any strides
    b,  # [tokens, cols] any strides
    indices,  # [k] int32 or int64, sorted
    bounds,  # [rows + 1] int32 or int64: the first slot of each row
    scratch,  # [programs, HIGH, WIDE] float32: a tile of the product for each program
    out,  # [k] float32
    tokens,
    rows,
    cols,
    stride_a_token,
    stride_a_row,
    stride_b_token,
    stride_b_col,
    across,  # tiles in a row of tiles
    tiles,
    steps,  # halvings that single out one of a row's slots
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # multiply in float32
):
    # A program computes tile after tile. It writes each to its scratch, which stays in the cache, and picks the entries
    # from there.
    own = scratch + tl.program_id(0).to(tl.int64) * (HIGH * WIDE)
    place = tl.arange(0, HIGH)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first_col = (tile % across) * WIDE
        row = (tile // across) * HIGH + tl.arange(0, HIGH)
        col = first_col + tl.arange(0, WIDE)
        here = row < rows
        begin = tl.load(bounds + row, mask=here, other=0)
        end = tl.load(bounds + row + 1, mask=here, other=0)
        left = row.to(tl.int64) * cols + first_col  # position of the row's first entry in the tile
        low = first_at_least(indices, begin, end, left, steps)
        high = first_at_least(indices, low, end, left + tl.minimum(WIDE, cols - first_col), steps)
        most = tl.max(high - low, axis=0)
        if most > 0:
            total = tl.zeros([HIGH, WIDE], dtype=tl.float32)
            for start in range(0, tokens, TOKENS):
                n = start + tl.arange(0, TOKENS)
                token = n.to(tl.int64)
                left_block = tl.load(
                    a + token[None, :] * stride_a_token + row[:, None].to(tl.int64) * stride_a_row,
                    mask=here[:, None] & (n < tokens)[None, :],
                    other=0.0,
                )
                right_block = tl.load(
                    b + token[:, None] * stride_b_token + col[None, :].to(tl.int64) * stride_b_col,
                    mask=(n < tokens)[:, None] & (col < cols)[None, :],
                    other=0.0,
                )
                if WIDEN:
                    left_block = left_block.to(tl.float32)
                    right_block = right_block.to(tl.float32)
                total = tl.dot(left_block, right_block, total, input_precision=PRECISION)
            tl.store(own + place, total)
            # Other threads of this program have stored what follows reads.
            tl.debug_barrier()
            for number in range(0, most):
                slot = low + number
                inside = slot < high
                position = tl.load(indices + slot, mask=inside, other=0).to(tl.int64)
                column = tl.where(inside, position - left, 0)
                value = tl.load(own + tl.arange(0, HIGH) * WIDE + column, mask=inside, other=0.0)
                tl.store(out + slot, value, mask=inside)
            # The next tile overwrites the scratch.
            tl.debug_barrier()
