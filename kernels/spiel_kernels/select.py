"""Selects the k largest entries of a weight gradient exactly, block by block, so that no dense gradient is held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import operation, runs_triton
from .fold import accumulation_dtype
from .gather import ConvGeometry, conv_weight_gradient, embedding_row_gradients
from .index_set import rows_and_columns
from .outer_products import check_operands, outer_row_blocks
from .streaming import check_k, topk_of_blocks

# Entries of a dense gradient that are looked at in one go.
_DENSE_BLOCK = 1 << 20
# A block of a gradient with fewer entries is not worth making smaller.
_SMALL_BLOCK = 1 << 19


def _block_rows(rows: int, cols: int, k: int) -> int:
    """Rows of a block of a ``[rows, cols]`` gradient from which k entries are selected, beside the best so far."""
    few = min(256, rows // 4)
    if 4 * k < rows * cols:
        few = min(rows // 2, max(few, _SMALL_BLOCK // max(cols, 1)))
    return max(1, few)


def _top_of(values: Tensor, k: int) -> Tensor:
    """Slots of the k largest of ``|values|`` ``[n]``; copies one block of the values at a time."""
    parts = enumerate(values.detach().split(_DENSE_BLOCK))
    return topk_of_blocks(((number * _DENSE_BLOCK, part.abs()) for number, part in parts), k, values.device)


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
    check_operands(a, b)
    if runs_triton(a, b):
        from .triton_backend import select

        return select.topk_outer(a, b, k)
    cols = b.shape[1]
    wide = b.detach().to(accumulation_dtype(a, b))
    blocks = outer_row_blocks(a.detach(), wide, _block_rows(a.shape[1], cols, k))
    return topk_of_blocks(((first * cols, block.abs_()) for first, block in blocks), k, a.device)


@dataclass(frozen=True)
class Largest:
    """The largest entries of a weight gradient, some of which only the device may know.

    Attributes:
        positions: int64 ``[n]``, ascending.
        values: the entries there ``[n]``, in the accumulation dtype; None if they were not kept.
        found: None if all positions hold. Else int64 ``[2]`` on the device: how many hold, the first ones, and whether
            they are the largest entries (1) or a sample misled (0).
    """

    positions: Tensor
    values: Tensor | None = None
    found: Tensor | None = None


def largest_outer(a: Tensor, b: Tensor, k: int, wait: bool = True) -> Largest:
    """`topk_outer`, on a GPU without waiting for it unless `wait` is True."""
    k = min(k, a.shape[1] * b.shape[1])
    plain = not wait and k > 0 and a.shape[0] > 0 and torch.float64 not in (a.dtype, b.dtype)
    if plain and runs_triton(a, b):
        from .triton_backend import select

        return Largest(*select.largest_outer(a, b, k))
    return Largest(topk_outer(a, b, k))


def topk_conv(grad_out: Tensor, x: Tensor, geometry: ConvGeometry, k: int) -> Tensor:
    """`topk_outer` for a convolution's weight gradient; positions in ``[out, in / groups, *kernel]``."""
    check_k(k)
    grad_out, x = grad_out.detach(), x.detach()
    rows, size = geometry.rows, _block_rows(geometry.rows, geometry.cols, k)

    def scores() -> Iterator[tuple[int, Tensor]]:
        for first in range(0, rows if x.shape[0] else 0, size):
            gradient = conv_weight_gradient(grad_out, x, geometry, first, min(first + size, rows))
            yield first * geometry.cols, gradient.abs_()

    return topk_of_blocks(scores(), k, x.device)


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
    row, column = rows_and_columns(slots, width)
    return rows[row] * width + column


def _fake_topk_dense(gradient: Tensor, k: int) -> Tensor:
    return gradient.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@operation("topk_dense(Tensor gradient, int k) -> Tensor", _fake_topk_dense)
def topk_dense(gradient: Tensor, k: int) -> Tensor:
    """`topk_outer` for a dense gradient of any shape; positions in the flattened gradient."""
    check_k(k)
    return _top_of(gradient.flatten(), k)
