"""SM3 accumulators of a sparse delta (Anil et al., 2019, algorithm SM3-II) and growth from their outer sum."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import on_host, operation, runs_triton
from .index_set import rows_and_columns, true_slots

_MAGNITUDE = 0x7FFF_FFFF_FFFF_FFFF
_INFINITY = float("inf")
# Most rounds of the search by value.
_ROUNDS = 64
# So many candidates beyond those wanted are listed rather than left out by another round, which would cost more.
_SPARE = 64


def ordered_bits(scores: Tensor) -> Tensor:
    """int64 keys that sort as the float64 `scores` ``[n]`` do (no NaN): on a CPU several times faster to sort."""
    bits = scores.view(torch.int64)
    return torch.where(bits < 0, bits ^ _MAGNITUDE, bits)


def _key_of(score: float) -> int:
    (bits,) = struct.unpack("<q", struct.pack("<d", score))
    return bits ^ _MAGNITUDE if bits < 0 else bits


def _score_of(key: int) -> float:
    (score,) = struct.unpack("<d", struct.pack("<q", key ^ _MAGNITUDE if key < 0 else key))
    return score


# The best entries of an outer sum are found without the matrix. Scores are ``log_row[i] + log_col[j]`` in float64. One
# of the vectors is sorted. The pairs that reach a threshold are then a prefix of it for every entry of the other, so
# that one binary search per entry counts them. Two searches use this:
#
# - `_near_threshold` bisects by value. Its binary search compares ``log_col[j]`` with ``threshold - log_row[i]``, which
#   rounds otherwise than the score does. It therefore lowers the threshold that it found by a margin that covers the
#   rounding.
# - `_exact_threshold` bisects over the bits of the score itself and ends at the score of the last position that is
#   chosen. It is needed for more equal scores than can be listed, and for infinite accumulators.
#
# On a GPU kernels make the second search, see `triton_backend.top_outer`.


@dataclass(frozen=True)
class OuterSum:
    """The scores ``outer[i] + inner[j]`` of all pairs, `inner` sorted in descending order, and the pairs left out.

    ``-inf`` marks entries without candidates. A pair is the position ``i * outer_stride + order[j] * inner_stride``.
    """

    outer: Tensor  # float64 [A]
    inner: Tensor  # float64 [C], descending
    order: Tensor  # int64 [C]: where each entry of inner was before sorting
    outer_stride: int
    inner_stride: int
    left_out_outer: Tensor  # int64 [k]
    left_out_rank: Tensor  # int64 [k], into inner
    left_out_scores: Tensor  # float64 [k]

    @classmethod
    def build(cls, log_row: Tensor, log_col: Tensor, left_out: tuple[Tensor, Tensor], by_rows: bool) -> OuterSum:
        """Sort the columns' vector if `by_rows`, else the rows'. `left_out`: rows and columns of the pairs left out."""
        outer, inner = (log_row, log_col) if by_rows else (log_col, log_row)
        left_outer, left_inner = left_out if by_rows else reversed(left_out)
        strides = (log_col.numel(), 1) if by_rows else (1, log_col.numel())
        keys, order = torch.sort(~ordered_bits(inner), stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        scores = outer.index_select(0, left_outer) + inner.index_select(0, left_inner)
        return cls(outer, inner[order], order, *strides, left_outer, rank.index_select(0, left_inner), scores)

    def pairs(self, ends: Tensor, room: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and scores, ``[room]`` each, of the first pairs of every i; score -inf: none, or left out.

        Args:
            ends: int64 ``[A]``, how many pairs up to and with i are wanted.
            room: at least as many; beyond them stands any position, with score -inf.
            hidden: bool ``[k]``, `reached` for this reach.
        """
        number = torch.arange(room, device=ends.device)
        owner = torch.searchsorted(ends, number, right=True)
        beyond = owner == ends.numel()
        owner.clamp_(max=ends.numel() - 1)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        rank = number.sub_(starts.index_select(0, owner)).clamp_(max=self.inner.numel() - 1)
        # The last slot takes the -inf of pairs that are left out but lie beyond the reach, or the room.
        scores = torch.empty(room + 1, dtype=torch.float64, device=ends.device)
        torch.add(self.outer.index_select(0, owner), self.inner.index_select(0, rank), out=scores[:room])
        scores[:room].masked_fill_(beyond, -_INFINITY)
        slots = starts.index_select(0, self.left_out_outer).add_(self.left_out_rank)
        scores.index_fill_(0, slots.where(hidden & (slots < room), room), -_INFINITY)
        positions = owner.mul_(self.outer_stride).add_(self.order.index_select(0, rank), alpha=self.inner_stride)
        return positions, scores[:room]

    def reached(self, reach: Tensor) -> Tensor:
        """Which of the pairs left out are among the first ``reach[i]`` of their i: bool ``[k]``."""
        return self.left_out_rank < reach.index_select(0, self.left_out_outer)


def top_outer(log_row: Tensor, log_col: Tensor, excluded: Tensor, m: int) -> Tensor:
    """The m best positions by ``log_row[i] + log_col[j]``, best first, ties to the lowest position.

    Takes O(out log out + in log in + k) time and O(out + in + k) memory.

    Args:
        log_row: float64 ``[rows]``, no NaN; -inf: no candidates there. log_col: float64 ``[cols]``, likewise.
        excluded: ``[k]`` unique flat positions in ``[rows, cols]`` that may not be chosen.
        m: how many, at least 1; neither vector is empty.

    Returns:
        int64 ``[min(m, candidates)]``.
    """
    left_out = rows_and_columns(excluded, log_col.numel())
    scores = OuterSum.build(log_row, log_col, left_out, by_rows=log_row.numel() <= log_col.numel())
    reach = _near_threshold(scores, m)
    hidden = scores.reached(reach)
    infinite = (log_row.amax() == _INFINITY) | (log_col.amax() == _INFINITY)
    total, left, degenerate = torch.stack([reach.sum(), hidden.sum(), infinite.long()]).tolist()
    if degenerate or total - left > _listable(scores, m):
        scores = OuterSum.build(log_row, log_col, left_out, by_rows=True)
        reach = _exact_threshold(scores, m)
        hidden = scores.reached(reach)
        total, left = torch.stack([reach.sum(), hidden.sum()]).tolist()
    positions, values = scores.pairs(reach.cumsum(0), total, hidden)
    if left and on_host(positions):
        kept = true_slots(values > -_INFINITY)
        positions, values = positions[kept], values[kept]
    positions, order = torch.sort(positions)
    best_first = torch.sort(~ordered_bits(values[order]), stable=True).indices
    return positions[best_first[: min(m, total - left)]]


def _listable(scores: OuterSum, m: int) -> int:
    return 2 * (m + _SPARE) + scores.outer.numel() + scores.inner.numel()


def _near_threshold(scores: OuterSum, m: int) -> Tensor:
    """A reach (int64 ``[A]``) whose pairs hold the m best candidates, ties included.

    They are not many more than m, unless many scores are equal. All scores must be below +inf.
    """
    low, high, slack = _score_range(scores)
    descending = -scores.inner
    for _ in range(_ROUNDS):
        trial = low + (high - low) / 2
        # Of the pairs left out too many may be subtracted, never too few: a threshold that passes has m candidates.
        left_out = torch.count_nonzero(scores.left_out_scores >= trial - slack)
        surplus = int(_prefixes(scores.outer, descending, trial).sum() - left_out) - m
        low, high = (trial, high) if surplus >= 0 else (low, trial)
        if 0 <= surplus <= m // 16 + _SPARE or bool(high - low <= slack):
            break
    return _prefixes(scores.outer, descending, low - 2 * slack)


def _prefixes(outer: Tensor, descending: Tensor, threshold: Tensor) -> Tensor:
    """How many pairs of each entry of `outer` reach a threshold, up to rounding.

    `descending` is the negative of `OuterSum.inner`, and so ascends.
    """
    return torch.searchsorted(descending, outer - threshold, right=True)


def _score_range(scores: OuterSum) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest and highest score, and a bound on the rounding between `_prefixes` and the scores; ``[1]`` each."""
    ends = _extremes(scores).nan_to_num(0.0, 0.0, 0.0)
    least_outer, most_outer, least_inner, most_inner = ends.split(1)
    size = ends[:2].abs().amax(0, keepdim=True) + ends[2:].abs().amax(0, keepdim=True)
    # Either side of the comparison rounds once or twice, by at most 2**-53 of three times the size.
    return least_outer + least_inner, most_outer + most_inner, size * 2.0**-50


def _extremes(scores: OuterSum) -> Tensor:
    """Least and largest entry of `scores.outer`, then of `scores.inner`, of those above -inf; +inf and -inf if none."""
    ends = []
    for vector in (scores.outer, scores.inner):
        ends += [vector.where(vector > -_INFINITY, _INFINITY).amin(), vector.amax()]
    return torch.stack(ends)


def _exact_threshold(scores: OuterSum, m: int) -> Tensor:
    """`_near_threshold` for any scores: the reach holds at most k + cols pairs beyond the m best candidates.

    `scores` are built by rows. Equal scores at the threshold are taken from the first rows only, as many as are needed.
    """
    least_outer, most_outer, least_inner, most_inner = _extremes(scores).tolist()
    low, high = _key_of(least_outer + least_inner), _key_of(most_outer + most_inner) + 1
    reach_low, reach_high = _exact_prefixes(scores, _score_of(low)), torch.zeros_like(scores.outer, dtype=torch.int64)

    def surplus(reach: Tensor) -> int:
        return int(reach.sum() - scores.reached(reach).sum()) - m

    if surplus(reach_low) <= 0:
        return reach_low
    while high - low > 1:
        middle = (low + high) // 2
        reach = _exact_prefixes(scores, _score_of(middle))
        if surplus(reach) >= 0:
            low, reach_low = middle, reach
        else:
            high, reach_high = middle, reach
    ties = reach_low - reach_high
    hidden = (scores.reached(reach_low) & ~scores.reached(reach_high)).to(torch.int64)
    ties.index_add_(0, scores.left_out_outer, hidden, alpha=-1)
    enough = ties.cumsum(0) >= -surplus(reach_high)
    # Ties are taken row by row. This marks the rows up to the one at which there are enough of them, that row included.
    needed = torch.cat([enough.new_zeros(1), enough[:-1]]).logical_not_()
    return reach_low.where(needed, reach_high)


def _exact_prefixes(scores: OuterSum, threshold: float) -> Tensor:
    """How many pairs of every entry of `scores.outer` have a score of at least `threshold`; int64 ``[A]``."""
    size = scores.inner.numel()
    reach = torch.zeros_like(scores.outer, dtype=torch.int64)
    step = 1 << (size.bit_length() - 1)
    while step:
        probe = reach + step
        value = scores.outer + scores.inner.index_select(0, (probe - 1).clamp_(max=size - 1))
        reach = probe.where((probe <= size) & (value >= threshold), reach)
        step //= 2
    return reach


# Entries per round on a CPU: temporary tensors stay in the cache, and are small beside the deltas of a large matrix.
_CHUNK = 1 << 15


def _fake_accumulate(row: Tensor, col: Tensor, indices: Tensor, gradient: Tensor) -> Tensor:
    return row.new_empty(indices.shape)


@operation(
    "sm3_accumulate_(Tensor(a!) row, Tensor(b!) col, Tensor indices, Tensor gradient) -> Tensor", _fake_accumulate
)
def sm3_accumulate_(row: Tensor, col: Tensor, indices: Tensor, gradient: Tensor) -> Tensor:
    """One SM3-II step on the active positions of a matrix; `row` and `col` are updated in place.

    ``nu_j = min(row[r_j], col[c_j]) + g_j**2``, then every accumulator takes the maximum of its own value and the
    nu of its active positions. For a full index set that is SM3-II itself: there the old accumulator never exceeds
    the new maximum.

    Args:
        row: ``[rows]`` floating, nonnegative; col: ``[cols]``, same dtype.
        indices: ``[k]`` flat positions in ``[rows, cols]``, sorted and unique.
        gradient: ``[k]``, floating.

    Returns:
        ``nu``, ``[k]`` in the accumulators' dtype.

    Raises:
        ValueError: `gradient` and `indices` differ in shape, or the accumulators in dtype.
    """
    if gradient.shape != indices.shape or indices.dim() != 1:
        raise ValueError(
            f"gradient must have one entry per position, got shape {tuple(gradient.shape)} for indices of shape "
            f"{tuple(indices.shape)}"
        )
    if row.dtype != col.dtype:
        raise ValueError(f"row and col must have the same dtype, got {row.dtype} and {col.dtype}")
    if _fits_triton(row, col, indices, gradient):
        from .triton_backend import momentum

        return momentum.sm3_accumulate_(row, col, indices, gradient)
    # Every position sees the accumulators as they were before the step.
    new_row, new_col = row.clone(), col.clone()
    nu = torch.empty(indices.shape, dtype=row.dtype, device=row.device)
    chunk = _CHUNK if on_host(row) else max(1, indices.numel())
    for part, out, some in zip(indices.split(chunk), nu.split(chunk), gradient.split(chunk), strict=True):
        rows, cols = rows_and_columns(part, col.numel())
        torch.minimum(row.index_select(0, rows), col.index_select(0, cols), out=out).add_(some.to(row.dtype).square())
        new_row.scatter_reduce_(0, rows, out, "amax", include_self=True)
        new_col.scatter_reduce_(0, cols, out, "amax", include_self=True)
    row.copy_(new_row)
    col.copy_(new_col)
    return nu


def _fits_triton(row: Tensor, col: Tensor, indices: Tensor, gradient: Tensor) -> bool:
    plain = row.dtype == torch.float32 and row.is_contiguous() and col.is_contiguous()
    return plain and gradient.dtype != torch.float64 and runs_triton(row, col, indices, gradient)


def _fake_top(row: Tensor, col: Tensor, excluded: Tensor, m: int) -> Tensor:
    return row.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@operation("top_outer_positions(Tensor row, Tensor col, Tensor excluded, int m) -> Tensor", _fake_top)
def top_outer_positions(row: Tensor, col: Tensor, excluded: Tensor, m: int) -> Tensor:
    """The m positions outside `excluded` with the largest ``log row + log col``.

    Scores are computed in float64. Positions with a zero accumulator are no candidates; ties go to the lowest
    position. Takes O(rows log rows + cols log cols + k) time and O(rows + cols + k) memory.

    Args:
        row: ``[rows]`` floating, nonnegative; col: ``[cols]``.
        excluded: ``[k]`` sorted and unique flat positions in ``[rows, cols]`` that may not be chosen.
        m: how many, at least 0.

    Returns:
        int64 ``[min(m, candidates)]``, best first.

    Raises:
        ValueError: `row`, `col` or `excluded` is not one-dimensional, or m is negative.
    """
    for name, tensor in (("row", row), ("col", col), ("excluded", excluded)):
        if tensor.dim() != 1:
            raise ValueError(f"{name} must be one-dimensional, got shape {tuple(tensor.shape)}")
    if m < 0:
        raise ValueError(f"m must be at least 0, got {m}")
    if m == 0 or row.numel() == 0 or col.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=row.device)
    if runs_triton(row, col, excluded):
        padded = top_outer_positions_padded(row, col, excluded, m)
        return padded[: int(torch.count_nonzero(padded >= 0))]
    return top_outer(*_candidate_logs(row, col), excluded, m)


def top_outer_positions_padded(row: Tensor, col: Tensor, excluded: Tensor, m: int) -> Tensor:
    """`top_outer_positions` as int64 ``[m]``, -1 where there are no more candidates.

    Its Triton implementation does not wait for the device.
    """
    if m > 0 and row.numel() and col.numel() and runs_triton(row, col, excluded):
        from .triton_backend import top_outer

        return top_outer.top_outer(*_candidate_logs(row, col), excluded, m)
    found = top_outer_positions(row, col, excluded, m)
    return torch.cat([found, found.new_full((m - found.numel(),), -1)]) if found.numel() < m else found


def top_outer_positions_dense(row: Tensor, col: Tensor, excluded: Tensor, m: int) -> Tensor:
    """`top_outer_positions` computed from the whole matrix of scores; tests and benchmarks compare with it."""
    log_row, log_col = _candidate_logs(row, col)
    scores = (log_row[:, None] + log_col).flatten()
    scores[excluded.to(torch.int64)] = float("-inf")
    # The sum of +inf and -inf is NaN, and no candidate either.
    scores.nan_to_num_(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    values, best_first = torch.sort(scores, descending=True, stable=True)
    return best_first[: min(m, int(torch.count_nonzero(values > float("-inf"))))]


def _candidate_logs(row: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
    """Logs in float64 of both; -inf, no candidate, for accumulators that are zero, negative or NaN."""
    logs = torch.cat([row, col]).to(torch.float64).log_()
    logs.nan_to_num_(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    return logs[: row.numel()], logs[row.numel() :]
