"""Gradients of single weight entries: the dense weight gradient is formed in row blocks and never held whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .fold import accumulation_dtype


def _gather_rows(rows: int) -> int:
    # Large enough for a matrix product at full speed, never the whole gradient.
    return max(1, min(512, rows // 2))


def _select_rows(rows: int) -> int:
    # A selection holds its best so far beside the block.
    return max(1, min(256, rows // 4))


def _gather_from_blocks(
    indices: Tensor, rows: int, cols: int, block: Callable[[int, int], Tensor], dtype: torch.dtype
) -> Tensor:
    """Read sorted flat positions from row blocks that are computed only where a position needs them."""
    out = torch.empty(indices.numel(), dtype=dtype, device=indices.device)
    size = _gather_rows(rows)
    starts = torch.arange(0, rows + size, size, device=indices.device) * cols
    bounds = torch.searchsorted(indices.to(torch.int64), starts).tolist()
    for number, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if begin == end:
            continue
        first = number * size
        values = block(first, min(first + size, rows))
        out[begin:end] = values.flatten().take(indices[begin:end].to(torch.int64) - first * cols)
    return out


def outer_row_blocks(a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Row blocks of ``a.T @ b`` in the accumulation dtype, as ``(first row, block)``."""
    dtype = accumulation_dtype(a, b)
    wide = b.to(dtype)
    size = _select_rows(a.shape[1])
    for start in range(0, a.shape[1], size):
        yield start, a[:, start : start + size].to(dtype).T @ wide


def gather_outer(a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
    """Selected entries of ``a.T @ b``: ``g[j] = sum_n a[n, row_j] * b[n, col_j]``.

    For a linear layer (weight ``[out, in]``) a is the output gradient and b the input; for a transposed one the
    other way round.

    Args:
        a: ``[N, rows]``, floating; b: ``[N, cols]``; any strides, N may be 0.
        indices: ``[k]`` sorted flat positions in ``[rows, cols]``.

    Returns:
        ``[k]`` in the accumulation dtype (float32, or float64 if an operand has it).
    """
    dtype = accumulation_dtype(a, b)
    wide = b.to(dtype)

    def block(first: int, last: int) -> Tensor:
        return a[:, first:last].to(dtype).T @ wide

    return _gather_from_blocks(indices, a.shape[1], b.shape[1], block, dtype)


def embedding_row_gradients(
    grad_out: Tensor, ids: Tensor, padding_idx: int | None, by_frequency: bool
) -> tuple[Tensor, Tensor]:
    """The rows of an embedding's weight gradient that can be other than zero.

    Args:
        grad_out: ``[*ids.shape, width]``; ids: integer, any shape.
        padding_idx: row that gets no gradient, or None.
        by_frequency: divide a row's gradient by how often it occurs (``scale_grad_by_freq``).

    Returns:
        ``(rows, gradients)``: int64 ``[u]`` ascending, and ``[u, width]`` in the accumulation dtype.
    """
    width = grad_out.shape[-1]
    flat, grads = ids.reshape(-1).to(torch.int64), grad_out.reshape(-1, width)
    if padding_idx is not None:
        used = flat != padding_idx
        flat, grads = flat[used], grads[used]
    rows, inverse, counts = torch.unique(flat, return_inverse=True, return_counts=True)
    dtype = accumulation_dtype(grads)
    sums = torch.zeros(rows.numel(), width, dtype=dtype, device=grads.device)
    sums.index_add_(0, inverse, grads.to(dtype))
    if by_frequency:
        sums /= counts.to(dtype)[:, None]
    return rows, sums


def gather_embedding(
    grad_out: Tensor, ids: Tensor, indices: Tensor, padding_idx: int | None, by_frequency: bool
) -> Tensor:
    """Selected entries of an embedding's weight gradient; arguments as in `embedding_row_gradients`.

    Returns:
        ``[k]`` in the accumulation dtype, zero where the row does not occur in `ids`.
    """
    rows, sums = embedding_row_gradients(grad_out, ids, padding_idx, by_frequency)
    positions = indices.to(torch.int64)
    width = sums.shape[1]
    out = torch.zeros(positions.numel(), dtype=sums.dtype, device=positions.device)
    if rows.numel() == 0:
        return out
    wanted = torch.div(positions, width, rounding_mode="floor")
    slots = torch.searchsorted(rows, wanted).clamp_(max=rows.numel() - 1)
    hit = (rows[slots] == wanted).nonzero().flatten()
    out[hit] = sums[slots[hit], positions[hit] % width]
    return out


@dataclass(frozen=True)
class ConvGeometry:
    """What `torch.nn.functional.conv*d` needs besides the tensors; padding is numeric and zero-valued."""

    weight_shape: tuple[int, ...]  # [out, in / groups, *kernel]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def rows(self) -> int:
        return self.weight_shape[0]

    @property
    def cols(self) -> int:
        return math.prod(self.weight_shape[1:])


def conv_weight_gradient(grad_out: Tensor, x: Tensor, geometry: ConvGeometry, first: int, last: int) -> Tensor:
    """Rows first..last of a convolution's weight gradient, ``[last - first, cols]`` in the accumulation dtype.

    Args:
        grad_out: ``[batch, out, *spatial]``; x: ``[batch, in, *spatial]``.
    """
    dtype = accumulation_dtype(grad_out, x)
    per_group_out = geometry.rows // geometry.groups
    per_group_in = geometry.weight_shape[1]
    parts = []
    while first < last:
        group = first // per_group_out
        stop = min(last, (group + 1) * per_group_out)
        gradient = torch.ops.aten.convolution_backward(
            grad_out[:, first:stop].to(dtype),
            x[:, group * per_group_in : (group + 1) * per_group_in].to(dtype),
            torch.empty((stop - first, *geometry.weight_shape[1:]), dtype=dtype, device=x.device),
            None,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            False,
            [0] * len(geometry.stride),
            1,
            [False, True, False],
        )[1]
        parts.append(gradient.reshape(stop - first, geometry.cols))
        first = stop
    return torch.cat(parts)


def conv_row_blocks(grad_out: Tensor, x: Tensor, geometry: ConvGeometry) -> Iterator[tuple[int, Tensor]]:
    """Row blocks of a convolution's weight gradient, as ``(first row, block)``."""
    size = _select_rows(geometry.rows)
    for start in range(0, geometry.rows, size):
        yield start, conv_weight_gradient(grad_out, x, geometry, start, min(start + size, geometry.rows))


def gather_conv(grad_out: Tensor, x: Tensor, geometry: ConvGeometry, indices: Tensor) -> Tensor:
    """Selected entries of a convolution's weight gradient.

    Args:
        grad_out: ``[batch, out, *spatial]``; x: ``[batch, in, *spatial]``; batch may be 0.
        indices: ``[k]`` sorted flat positions in ``[out, in / groups, *kernel]``.

    Returns:
        ``[k]`` in the accumulation dtype.
    """
    dtype = accumulation_dtype(grad_out, x)
    if x.shape[0] == 0:
        return torch.zeros(indices.numel(), dtype=dtype, device=indices.device)
    return _gather_from_blocks(
        indices,
        geometry.rows,
        geometry.cols,
        lambda first, last: conv_weight_gradient(grad_out, x, geometry, first, last),
        dtype,
    )


def gather_dense(gradient: Tensor, indices: Tensor) -> Tensor:
    """Selected entries of a gradient that is already there, in the accumulation dtype."""
    return gradient.take(indices.to(torch.int64)).to(accumulation_dtype(gradient))
