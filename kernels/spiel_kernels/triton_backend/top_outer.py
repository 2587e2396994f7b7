"""The best entries of an outer sum by two kernels, without the matrix and without waiting for the device.

Of the best positions k may be taken already. So the best m + k are listed, those taken are struck out, and the rest is
sorted. `_threshold_kernel` finds the score of the last one listed. It bisects over the bits of the score, and is thus
exact: with the columns sorted, the entries of a row that reach a threshold are a prefix, found by a binary search. The
interval that is searched in a row shrinks with that of the threshold, so that all rounds together take little more than
one search through all of the columns. `_list_kernel` writes the entries into memory of a size that the host knows.

The oracle in plain PyTorch is `spiel_kernels.momentum.top_outer`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .outer_kernels import first_at_least

# Rows that the one program of the search looks at together, on as many threads as a program can have.
_SEARCH_BLOCK = 2048
_SEARCH_WARPS = 16
_LIST_BLOCK = 256
# So many rounds halve the range of scores; those after them halve the range of its bits, which comes to an end.
_BY_VALUE = tl.constexpr(20)
_MAGNITUDE = tl.constexpr(0x7FFF_FFFF_FFFF_FFFF)


@triton.jit
def _key_of(score):
    """int64 that orders as float64 scores do."""
    bits = score.to(tl.int64, bitcast=True)
    return tl.where(bits < 0, bits ^ _MAGNITUDE, bits)


@triton.jit
def _score_of(key):
    """The inverse of `_key_of`."""
    return tl.where(key < 0, key ^ _MAGNITUDE, key).to(tl.float64, bitcast=True)


@triton.jit
def _entries_that_reach(log_col, outer, begin, end, threshold):
    """How many entries of each row reach a threshold, between `begin` and `end` of them."""
    span = tl.max(end - begin, axis=0)
    while span > 0:
        middle = (begin + end) >> 1
        searching = begin < end
        inner = tl.load(log_col + middle, mask=searching, other=0.0)
        passes = outer + inner >= threshold
        begin = tl.where(searching & passes, middle + 1, begin)
        end = tl.where(passes, end, middle)
        span = span >> 1
    return begin


@triton.jit(do_not_specialize=["rows", "cols", "wanted"])
def _threshold_kernel(
    log_row,  # [rows] float64; -inf: no candidates
    log_col,  # [cols] float64, descending; likewise
    reach,  # [3, rows] int32, changed: entries of each row that reach the low, the high and the tried threshold
    ends,  # [rows + 1] int64, written: entries listed before each row, and all of them
    rows,
    cols,
    wanted,
    BLOCK: tl.constexpr,
):
    # A single program, as every round waits for the one before. The low threshold is reached by the wanted entries or
    # more, the high one by fewer. Up to `cols` entries more than wanted may be listed, which ends most searches early.
    lanes = tl.arange(0, BLOCK)
    wanted = wanted.to(tl.int64)
    most_listed = wanted + cols
    filled = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, cols, BLOCK):
        score = tl.load(log_col + start + lanes, mask=start + lanes < cols, other=float("-inf"))
        filled += (score > float("-inf")).to(tl.int32)
    width = tl.sum(filled, axis=0)
    least = tl.full([BLOCK], float("inf"), dtype=tl.float64)
    most = tl.full([BLOCK], float("-inf"), dtype=tl.float64)
    filled = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, rows, BLOCK):
        slots = start + lanes
        inside = slots < rows
        outer = tl.load(log_row + slots, mask=inside, other=float("-inf"))
        has = outer > float("-inf")
        tl.store(reach + slots, tl.where(has, width, 0), mask=inside)
        tl.store(reach + rows + slots, 0, mask=inside)
        least = tl.minimum(least, tl.where(has, outer, float("inf")))
        most = tl.maximum(most, outer)
        filled += has.to(tl.int32)
    tl.debug_barrier()
    at_low = tl.sum(filled, axis=0).to(tl.int64) * width
    at_high = at_low * 0
    low = _key_of(tl.min(least, axis=0) + tl.load(log_col + tl.maximum(width, 1) - 1))
    high = _key_of(tl.max(most, axis=0) + tl.load(log_col)) + 1
    low_place = rows * 0
    high_place = rows
    tried_place = rows * 2
    rounds = rows * 0
    while (at_low > most_listed) & (low + 1 < high):
        by_bits = (low >> 1) + (high >> 1) + (low & high & 1)
        by_value = _key_of(0.5 * _score_of(low) + 0.5 * _score_of(high - 1))
        by_value = tl.minimum(tl.maximum(by_value, low + 1), high - 1)
        tried = tl.where(rounds < _BY_VALUE, by_value, by_bits)
        threshold = _score_of(tried)
        reached = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(0, rows, BLOCK):
            slots = start + lanes
            inside = slots < rows
            outer = tl.load(log_row + slots, mask=inside, other=0.0)
            begin = tl.load(reach + high_place + slots, mask=inside, other=0)
            end = tl.load(reach + low_place + slots, mask=inside, other=0)
            found = _entries_that_reach(log_col, outer, begin, end, threshold)
            tl.store(reach + tried_place + slots, found, mask=inside)
            reached += found
        total = tl.sum(reached.to(tl.int64), axis=0)
        enough = total >= wanted
        low = tl.where(enough, tried, low)
        high = tl.where(enough, high, tried)
        at_low = tl.where(enough, total, at_low)
        at_high = tl.where(enough, at_high, total)
        spare_place = tl.where(enough, low_place, high_place)
        low_place = tl.where(enough, tried_place, low_place)
        high_place = tl.where(enough, high_place, tried_place)
        tried_place = spare_place
        rounds += 1
        tl.debug_barrier()  # the next round reads what other threads have written
    # Where too many entries reach the low threshold, they lie at it: the first rows list theirs until there are enough.
    ties_wanted = tl.where(at_low > most_listed, wanted - at_high, at_low)
    ties_before = at_low * 0
    listed = at_low * 0
    tl.store(ends, listed)
    for start in range(0, rows, BLOCK):
        slots = start + lanes
        inside = slots < rows
        fewer = tl.load(reach + high_place + slots, mask=inside, other=0).to(tl.int64)
        more = tl.load(reach + low_place + slots, mask=inside, other=0).to(tl.int64)
        ties = more - fewer
        earlier = ties_before + tl.cumsum(ties, axis=0) - ties
        taken = tl.where(earlier < ties_wanted, more, fewer)
        tl.store(ends + 1 + slots, listed + tl.cumsum(taken, axis=0), mask=inside)
        ties_before += tl.sum(ties, axis=0)
        listed += tl.sum(taken, axis=0)


@triton.jit(do_not_specialize=["rows", "cols", "k", "room", "row_steps", "excluded_steps"])
def _list_kernel(
    log_row,  # [rows] float64
    log_col,  # [cols] float64, descending
    order,  # [cols] int64: the column of each entry of log_col
    ends,  # [rows + 1] int64
    excluded,  # [k] int32 or int64, ascending
    scores,  # [room] float64, written: -inf where nothing is listed
    positions,  # [room] int64, written: -1 there
    rows,
    cols,
    k,
    room,
    row_steps,  # halvings that single out one row
    excluded_steps,  # and one excluded position
    BLOCK: tl.constexpr,
):
    slots = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    listed = slots < tl.load(ends + rows)
    none = tl.zeros([BLOCK], dtype=tl.int32)
    # The row of a slot: so many rows end before it.
    row = first_at_least(ends + 1, none, tl.where(listed, rows, 0), slots + 1, row_steps)
    rank = slots - tl.load(ends + row, mask=listed, other=0)
    column = tl.load(order + rank, mask=listed, other=0)
    position = row.to(tl.int64) * cols + column
    score = tl.load(log_row + row, mask=listed, other=0.0) + tl.load(log_col + rank, mask=listed, other=0.0)
    # So many excluded positions are lower.
    lower = first_at_least(excluded, none.to(tl.int64), tl.where(listed, k, 0).to(tl.int64), position, excluded_steps)
    listed = listed & (tl.load(excluded + lower, mask=listed & (lower < k), other=-1) != position)
    tl.store(scores + slots, tl.where(listed, score, float("-inf")), mask=slots < room)
    tl.store(positions + slots, tl.where(listed, position, -1), mask=slots < room)


def list_candidates(log_row: Tensor, log_col: Tensor, excluded: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Scores and positions, float64 and int64 ``[room]``, that hold the m best candidates; -inf and -1 elsewhere.

    See `spiel_kernels.momentum.top_outer` for the arguments; `excluded` ascends. Room is for ``m + k + cols``.
    """
    rows, cols, k = log_row.numel(), log_col.numel(), excluded.numel()
    wanted = min(m + k, rows * cols)
    room = max(m, min(wanted + cols, rows * cols))
    log_row, excluded = log_row.contiguous(), excluded.contiguous()
    log_col, order = torch.sort(log_col, descending=True, stable=True)
    reach = torch.empty(3 * rows, dtype=torch.int32, device=log_row.device)
    ends = torch.empty(rows + 1, dtype=torch.int64, device=log_row.device)
    scores = torch.empty(room, dtype=torch.float64, device=log_row.device)
    positions = torch.empty(room, dtype=torch.int64, device=log_row.device)
    with torch.cuda.device_of(log_row):
        _threshold_kernel[(1,)](
            log_row, log_col, reach, ends, rows, cols, wanted, BLOCK=_SEARCH_BLOCK, num_warps=_SEARCH_WARPS
        )
        _list_kernel[(triton.cdiv(room, _LIST_BLOCK),)](
            log_row,
            log_col,
            order,
            ends,
            excluded,
            scores,
            positions,
            rows,
            cols,
            k,
            room,
            rows.bit_length(),
            k.bit_length(),
            BLOCK=_LIST_BLOCK,
            num_warps=4,
        )
    return scores, positions


def top_outer(log_row: Tensor, log_col: Tensor, excluded: Tensor, m: int) -> Tensor:
    """`spiel_kernels.momentum.top_outer` without a wait: int64 ``[m]``, -1 where there are no more candidates.

    Takes O((rows + cols) log cols) time for the search and holds O(rows + cols + k + m) numbers.
    """
    scores, positions = list_candidates(log_row, log_col, excluded, m)
    # By position first: a stable sort by score then puts the lowest position first among equal scores.
    positions, order = torch.sort(positions)
    best_first = torch.sort(scores.index_select(0, order), descending=True, stable=True).indices
    return positions.index_select(0, best_first[:m])
