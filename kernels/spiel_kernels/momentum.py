"""SM3 accumulators of a sparse delta (Anil et al., 2019, algorithm SM3-II) and growth from their outer sum."""

from __future__ import annotations

import torch
from torch import Tensor

from .select import StreamingTopK

_BLOCK_ENTRIES = 1 << 20


def sm3_accumulate_(row: Tensor, col: Tensor, indices: Tensor, gradient: Tensor) -> Tensor:
    """One SM3-II step on the active positions of a matrix; `row` and `col` are updated in place.

    ``nu_j = min(row[r_j], col[c_j]) + g_j**2``, then every accumulator takes the maximum of its own value and the
    nu of its active positions. For a full index set that is SM3-II itself: there the old accumulator never exceeds
    the new maximum.

    Args:
        row: ``[rows]`` floating, nonnegative; col: ``[cols]``.
        indices: ``[k]`` flat positions in ``[rows, cols]``, unique.
        gradient: ``[k]``.

    Returns:
        ``nu``, ``[k]`` in the accumulators' dtype.
    """
    positions = indices.to(torch.int64)
    rows = torch.div(positions, col.numel(), rounding_mode="floor")
    cols = positions - rows * col.numel()
    nu = torch.minimum(row[rows], col[cols]) + gradient.to(row.dtype).square()
    row.scatter_reduce_(0, rows, nu, "amax", include_self=True)
    col.scatter_reduce_(0, cols, nu, "amax", include_self=True)
    return nu


def top_outer_positions(row: Tensor, col: Tensor, excluded: Tensor, m: int) -> Tensor:
    """The m positions outside `excluded` with the largest ``log row + log col``.

    Scores are computed in float64. Positions with a zero accumulator are no candidates; ties go to the lowest
    position.

    Args:
        row: ``[rows]``, nonnegative; col: ``[cols]``.
        excluded: ``[k]`` sorted flat positions that may not be chosen.
        m: how many.

    Returns:
        int64 ``[<= m]``, best first.
    """
    log_row, log_col = row.to(torch.float64).log(), col.to(torch.float64).log()
    cols = col.numel()
    top = StreamingTopK(m, floor=float("-inf"))
    size = max(1, _BLOCK_ENTRIES // max(1, cols))
    excluded = excluded.to(torch.int64)
    for first in range(0, row.numel(), size):
        scores = (log_row[first : first + size, None] + log_col).flatten()
        low = first * cols
        begin, end = torch.searchsorted(excluded, torch.tensor([low, low + scores.numel()], device=row.device))
        scores[excluded[begin:end] - low] = float("-inf")
        top.update(scores, low)
    positions = top.result().to(row.device)
    if top.scores is None:
        return positions
    return positions[torch.sort(top.scores, descending=True, stable=True).indices]
