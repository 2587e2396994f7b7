"""Exact top-k selection of gradient entries, streamed over blocks so that no dense gradient is held."""

from __future__ import annotations

import torch
from torch import Tensor

from .gather import ConvGeometry, conv_row_blocks, embedding_row_gradients, outer_row_blocks


def stable_topk(scores: Tensor, k: int) -> Tensor:
    """Slots of the `k` largest scores; among equal scores the earlier slot wins.

    ``torch.topk`` leaves the choice among ties open, so two runs, or two devices, could differ.

    Args:
        scores: ``[n]``, no NaN.
        k: how many; more than n returns all.

    Returns:
        int64 ``[min(k, n)]`` in ascending order of slots.
    """
    if k >= scores.numel():
        return torch.arange(scores.numel(), device=scores.device)
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    threshold = torch.topk(scores, k).values[-1]
    keep = scores > threshold
    ties = (scores == threshold).nonzero().flatten()
    keep[ties[: k - int(keep.sum())]] = True
    return keep.nonzero().flatten()


class StreamingTopK:
    """The k largest of many scores that arrive in blocks of ascending positions.

    Holds at most k scores between blocks; ties go to the lowest position, and scores at or below `floor` (as well as
    NaN) are never chosen.

    Args:
        k: how many to keep.
        floor: exclusive lower bound of a score that may be chosen.
    """

    def __init__(self, k: int, floor: float = 0.0) -> None:
        self.k = k
        self.floor = floor
        self.scores: Tensor | None = None
        self.positions: Tensor | None = None

    def update(self, scores: Tensor, positions: Tensor | int) -> None:
        """Offer a block.

        Args:
            scores: ``[n]``.
            positions: int64 ``[n]`` ascending and above all earlier ones, or the int offset of a dense block.
        """
        bound = self.floor
        if self.scores is not None and self.scores.numel() == self.k and self.k:
            bound = max(bound, float(self.scores.min()))
        # Equal to the bound loses: whoever holds it has a lower position.
        slots = (scores > bound).nonzero().flatten()
        if slots.numel() > self.k:
            slots = slots[stable_topk(scores[slots], self.k)]
        found = scores[slots]
        where = slots + positions if isinstance(positions, int) else positions[slots]
        if self.scores is not None and self.positions is not None:
            found = torch.cat([self.scores, found])
            where = torch.cat([self.positions, where])
            if found.numel() > self.k:
                keep = stable_topk(found, self.k)
                found, where = found[keep], where[keep]
        self.scores, self.positions = found, where

    def result(self) -> Tensor:
        """int64 positions found, at most k, ascending."""
        if self.positions is None:
            return torch.empty(0, dtype=torch.int64)
        return self.positions


def topk_outer(a: Tensor, b: Tensor, k: int) -> Tensor:
    """Positions of the k largest ``|a.T @ b|``, exact, row block by row block.

    Args:
        a: ``[N, rows]``; b: ``[N, cols]``.
        k: how many; entries that are exactly zero are never chosen.

    Returns:
        int64 ``[<= k]`` flat positions in ``[rows, cols]``, ascending; ties go to the lowest position.
    """
    top = StreamingTopK(k)
    for start, block in outer_row_blocks(a, b):
        top.update(block.abs().flatten(), start * b.shape[1])
    return top.result().to(a.device)


def topk_conv(grad_out: Tensor, x: Tensor, geometry: ConvGeometry, k: int) -> Tensor:
    """`topk_outer` for a convolution's weight gradient; positions in ``[out, in / groups, *kernel]``."""
    top = StreamingTopK(k)
    if x.shape[0] == 0:
        return top.result().to(x.device)
    for start, block in conv_row_blocks(grad_out, x, geometry):
        top.update(block.abs().flatten(), start * geometry.cols)
    return top.result().to(x.device)


def topk_embedding(grad_out: Tensor, ids: Tensor, padding_idx: int | None, by_frequency: bool, k: int) -> Tensor:
    """`topk_outer` for an embedding's weight gradient; only rows that occur in `ids` can be chosen."""
    rows, gradients = embedding_row_gradients(grad_out, ids, padding_idx, by_frequency)
    width = gradients.shape[1]
    top = StreamingTopK(k)
    offsets = torch.arange(width, device=rows.device)
    for start in range(0, rows.numel(), 1024):
        block = gradients[start : start + 1024]
        positions = (rows[start : start + 1024, None] * width + offsets).flatten()
        top.update(block.abs().flatten(), positions)
    return top.result().to(grad_out.device)


def topk_dense(gradient: Tensor, k: int) -> Tensor:
    """`topk_outer` for a gradient that is already there, of any shape."""
    top = StreamingTopK(k)
    top.update(gradient.abs().flatten(), 0)
    return top.result().to(gradient.device)
