"""SM3 accumulators of a sparse delta (Anil et al., 2019, algorithm SM3-II) and growth from their outer sum."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import operation, runs_triton
from .outer_top import split_positions, top_outer

# Entries per round on a CPU: temporary tensors stay in the cache, and small beside the deltas of a large matrix.
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
        ValueError: `gradient` has not one entry per position, or the accumulators differ in dtype.
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
    chunk = _CHUNK if row.device.type == "cpu" else max(1, indices.numel())
    for part, out, some in zip(indices.split(chunk), nu.split(chunk), gradient.split(chunk), strict=True):
        rows, cols = split_positions(part, col.numel())
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
        excluded: ``[k]`` unique flat positions in ``[rows, cols]`` that may not be chosen.
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
    return top_outer(_candidate_logs(row), _candidate_logs(col), excluded, m)


def top_outer_positions_dense(row: Tensor, col: Tensor, excluded: Tensor, m: int) -> Tensor:
    """`top_outer_positions` from all scores at once: what tests and benchmarks compare with."""
    scores = (_candidate_logs(row)[:, None] + _candidate_logs(col)).flatten()
    scores[excluded.to(torch.int64)] = float("-inf")
    # Infinity less infinity is no candidate either.
    scores.nan_to_num_(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    values, best_first = torch.sort(scores, descending=True, stable=True)
    return best_first[: min(m, int(torch.count_nonzero(values > float("-inf"))))]


def _candidate_logs(accumulator: Tensor) -> Tensor:
    """Logs in float64, -inf where there is nothing to rank: zero, negative or NaN."""
    logs = accumulator.to(torch.float64).log()
    return logs.nan_to_num_(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
