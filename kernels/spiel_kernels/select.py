"""Exact top-k selection of gradient entries, streamed over blocks so that no dense gradient is held."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import operation, runs_triton
from .gather import ConvGeometry, conv_row_blocks, embedding_row_gradients, outer_row_blocks
from .streaming import StreamingTopK, check_k

# Entries of a dense gradient at a time.
_DENSE_BLOCK = 1 << 20


def _top_of(scores: Tensor, k: int) -> Tensor:
    """Slots of the k largest of ``|scores|`` ``[n]``, never all of them at once."""
    top = StreamingTopK(k)
    for number, block in enumerate(scores.detach().split(_DENSE_BLOCK)):
        top.update(block.abs(), number * _DENSE_BLOCK)
    return top.result().to(scores.device)


def _fake_topk_outer(a: Tensor, b: Tensor, k: int) -> Tensor:
    return a.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@operation("topk_outer(Tensor a, Tensor b, int k) -> Tensor", _fake_topk_outer)
def topk_outer(a: Tensor, b: Tensor, k: int) -> Tensor:
    """Positions of the k largest ``|a.T @ b|``, exact, row block by row block.

    Args:
        a: ``[N, rows]``; b: ``[N, cols]``; floating, any strides, N may be 0.
        k: how many, at least 0; entries that are zero or NaN are never chosen.

    Returns:
        int64 ``[<= k]`` flat positions in ``[rows, cols]``, ascending; ties go to the lowest position.

    Raises:
        ValueError: k is negative, or `a` and `b` are not matrices of as many rows.
    """
    check_k(k)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[0]:
        raise ValueError(f"a and b must be [N, rows] and [N, cols], got {tuple(a.shape)} and {tuple(b.shape)}")
    if runs_triton(a, b):
        from .triton_backend import select

        return select.topk_outer(a, b, k)
    top = StreamingTopK(k)
    for start, block in outer_row_blocks(a.detach(), b.detach(), k):
        top.update(block.abs_().flatten(), start * b.shape[1])
    return top.result().to(a.device)


def topk_conv(grad_out: Tensor, x: Tensor, geometry: ConvGeometry, k: int) -> Tensor:
    """`topk_outer` for a convolution's weight gradient; positions in ``[out, in / groups, *kernel]``."""
    check_k(k)
    top = StreamingTopK(k)
    if x.shape[0]:
        for start, block in conv_row_blocks(grad_out.detach(), x.detach(), geometry, k):
            top.update(block.abs_().flatten(), start * geometry.cols)
    return top.result().to(x.device)


def _fake_topk_embedding(grad_out: Tensor, ids: Tensor, padding_idx: int | None, by_frequency: bool, k: int) -> Tensor:
    return grad_out.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@operation(
    "topk_embedding(Tensor grad_out, Tensor ids, int? padding_idx, bool by_frequency, int k) -> Tensor",
    _fake_topk_embedding,
)
def topk_embedding(grad_out: Tensor, ids: Tensor, padding_idx: int | None, by_frequency: bool, k: int) -> Tensor:
    """`topk_outer` for an embedding's weight gradient; only rows that occur in `ids` can be chosen."""
    check_k(k)
    rows, gradients = embedding_row_gradients(grad_out.detach(), ids, padding_idx, by_frequency)
    width = gradients.shape[1]
    # Rows are in ascending order, so slots among them rank ties as positions do.
    slots = _top_of(gradients.flatten(), k)
    row = torch.div(slots, width, rounding_mode="floor")
    return rows[row] * width + (slots - row * width)


def _fake_topk_dense(gradient: Tensor, k: int) -> Tensor:
    return gradient.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@operation("topk_dense(Tensor gradient, int k) -> Tensor", _fake_topk_dense)
def topk_dense(gradient: Tensor, k: int) -> Tensor:
    """`topk_outer` for a gradient that is already there, of any shape."""
    check_k(k)
    return _top_of(gradient.flatten(), k)
