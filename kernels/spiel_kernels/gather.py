"""Computes weight gradients at selected entries; the dense weight gradient is never held whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import operation, runs_triton
from .fold import accumulation_dtype, read_entries
from .index_set import row_bounds, rows_and_columns, true_slots
from .outer_plan import OuterPlan, known_plan, plan_for
from .outer_products import check_operands, check_planned, gather_by_plan, outer_block, read_row_blocks
from .sampled import gather_sampled, sampled_pays


def _gather_from_blocks(
    index_sets: Sequence[Tensor], shape: tuple[int, int], block: Callable[[int, int], Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """`read_row_blocks` with blocks that a matrix product computes at full speed, but never the whole matrix."""
    rows, cols = shape
    size = max(1, min(512, rows // 2))
    bounds = torch.stack([row_bounds(indices, rows, cols, size) for indices in index_sets]).tolist()
    return read_row_blocks(index_sets, shape, size, bounds, block, dtype)


METHODS = ("auto", "ready", "sampled", "dense", "compact", "entries")


def check_outer_operands(a: Tensor, b: Tensor, indices: Tensor) -> None:
    """Raise a ValueError unless these can be operands of `gather_outer`."""
    check_operands(a, b)
    if indices.dim() != 1:
        raise ValueError(f"indices must be one-dimensional, got shape {tuple(indices.shape)}")


def _fake_gather_outer(a: Tensor, b: Tensor, indices: Tensor, method: str = "auto") -> Tensor:
    check_outer_operands(a, b, indices)
    return a.new_empty(indices.shape, dtype=accumulation_dtype(a, b))


@operation("gather_outer(Tensor a, Tensor b, Tensor indices, str method='auto') -> Tensor", _fake_gather_outer)
def gather_outer(a: Tensor, b: Tensor, indices: Tensor, method: str = "auto") -> Tensor:
    """Selected entries of ``a.T @ b``: ``g[j] = sum_n a[n, row_j] * b[n, col_j]``.

    For a linear layer (weight ``[out, in]``) a is the output gradient and b the input; for a transposed one the
    other way round. The product is never held whole.

    Args:
        a: ``[N, rows]``, floating; b: ``[N, cols]``; any strides, N may be 0.
        indices: ``[k]`` sorted flat positions in ``[rows, cols]``.
        method: "auto" picks by sizes, and on a GPU by how the indices lie. To force one: "dense" (row blocks of the
            product), "sampled" (only the entries, chunk by chunk of tokens; CPU), "compact" (products over the columns
            that a block of rows touches) or "entries" (a dot product each); the last two are meant for GPUs.

    Returns:
        ``[k]`` in the accumulation dtype (float32, or float64 if an operand has it).

    Raises:
        ValueError: the operands' shapes do not fit, or the method is unknown or does not run on their device.
    """
    return gather_outer_sets(a, b, [indices], method)[0]


def gather_outer_sets(a: Tensor, b: Tensor, index_sets: Sequence[Tensor], method: str = "auto") -> list[Tensor]:
    """`gather_outer` for several index sets at once: products and copies of the operands are made once for all.

    Method "ready" is "auto" that never waits for a GPU: an index set without a plan (see `plan_together`) gets "dense".
    """
    for indices in index_sets:
        check_outer_operands(a, b, indices)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    on_cpu = a.device.type == "cpu"
    if method == "sampled" and not on_cpu:
        raise ValueError(f"method 'sampled' runs on the CPU, got tensors on {a.device}; leave method at 'auto'")
    triton = method != "sampled" and runs_triton(a, b)
    if triton or method in ("compact", "entries"):
        return _gather_by_plans(a, b, index_sets, method, triton)
    dtype = accumulation_dtype(a, b)
    rows, cols = a.shape[1], b.shape[1]
    total = sum(indices.numel() for indices in index_sets)
    if method == "sampled" or (method in ("auto", "ready") and on_cpu and sampled_pays(rows, cols, total)):
        return gather_sampled(a, b, index_sets, dtype)
    wide = b.to(dtype)

    def block(first: int, last: int) -> Tensor:
        return outer_block(a[:, first:last], wide)

    return _gather_from_blocks(index_sets, (rows, cols), block, dtype)


def _gather_by_plans(a: Tensor, b: Tensor, index_sets: Sequence[Tensor], method: str, triton: bool) -> list[Tensor]:
    dtype = torch.promote_types(a.dtype, b.dtype)
    rows, cols = a.shape[1], b.shape[1]
    if method == "ready":
        known = [known_plan(indices, rows, cols, dtype) for indices in index_sets]
        plans = [p or OuterPlan("dense", rows, cols, i.numel()) for p, i in zip(known, index_sets, strict=True)]
    else:
        plans = [plan_for(indices, rows, cols, dtype, method) for indices in index_sets]
    if triton:
        from .triton_backend import outer

        return outer.gather_outer_sets(a, b, index_sets, plans)
    return [gather_by_plan(a, b, indices, plan) for indices, plan in zip(index_sets, plans, strict=True)]


def _fake_gather_planned(
    a: Tensor, b: Tensor, indices: Tensor, method: str, layout: Sequence[int], tensors: Sequence[Tensor]
) -> Tensor:
    return a.new_empty(indices.shape, dtype=accumulation_dtype(a, b))


@operation(
    "gather_planned(Tensor a, Tensor b, Tensor indices, str method, int[] layout, Tensor[] tensors) -> Tensor",
    _fake_gather_planned,
)
def _gather_planned(
    a: Tensor, b: Tensor, indices: Tensor, method: str, layout: Sequence[int], tensors: Sequence[Tensor]
) -> Tensor:
    plan = OuterPlan(method, a.shape[1], b.shape[1], indices.numel(), tuple(layout), tuple(tensors))
    if runs_triton(a, b, indices):
        from .triton_backend.outer import gather_outer

        return gather_outer(a, b, indices, plan)
    return gather_by_plan(a, b, indices, plan)


def gather_planned(a: Tensor, b: Tensor, indices: Tensor, plan: OuterPlan) -> Tensor:
    """Selected entries of ``a.T @ b``, gathered by a plan: ``g[j] = sum_n a[n, row_j] * b[n, col_j]``.

    Args:
        a: ``[N, rows]``, floating; b: ``[N, cols]``; any strides. N may be 0 and differ from the plan's tokens.
        indices: ``[k]``, from which the plan was made.
        plan: from `plan_outer`, on the operands' device.

    Returns:
        ``[k]`` in the accumulation dtype (float32, or float64 if an operand has it).

    Raises:
        ValueError: the plan was made for other shapes or another number of indices.
    """
    check_planned(a, b, indices, plan)
    return _gather_planned(a, b, indices, plan.method, plan.layout, plan.tensors)


def embedding_row_gradients(
    grad_out: Tensor, ids: Tensor, padding_idx: int | None, by_frequency: bool
) -> tuple[Tensor, Tensor]:
    """The rows of an embedding's weight gradient that may be other than zero.

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
    return gather_embedding_sets(grad_out, ids, [indices], padding_idx, by_frequency)[0]


def gather_embedding_sets(
    grad_out: Tensor, ids: Tensor, index_sets: Sequence[Tensor], padding_idx: int | None, by_frequency: bool
) -> list[Tensor]:
    """`gather_embedding` for several index sets at once: the rows are summed once."""
    rows, sums = embedding_row_gradients(grad_out, ids, padding_idx, by_frequency)
    return [_pick_rows(rows, sums, indices) for indices in index_sets]


def _pick_rows(rows: Tensor, sums: Tensor, positions: Tensor) -> Tensor:
    width = sums.shape[1]
    out = torch.zeros(positions.numel(), dtype=sums.dtype, device=positions.device)
    if rows.numel() == 0:
        return out
    wanted, columns = rows_and_columns(positions, width)
    slots = torch.searchsorted(rows, wanted).clamp_(max=rows.numel() - 1)
    hit = true_slots(rows[slots] == wanted)
    out[hit] = sums[slots[hit], columns[hit]]
    return out


@dataclass(frozen=True)
class ConvGeometry:
    """Weight shape and settings of a convolution (`torch.nn.functional.conv*d`) with numeric zero padding."""

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
    """Rows first to last (exclusive) of a convolution's weight gradient: ``[last - first, cols]``, accumulation dtype.

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


def gather_conv(grad_out: Tensor, x: Tensor, geometry: ConvGeometry, indices: Tensor) -> Tensor:
    """Selected entries of a convolution's weight gradient.

    Args:
        grad_out: ``[batch, out, *spatial]``; x: ``[batch, in, *spatial]``; batch may be 0.
        indices: ``[k]`` sorted flat positions in ``[out, in / groups, *kernel]``.

    Returns:
        ``[k]`` in the accumulation dtype.
    """
    return gather_conv_sets(grad_out, x, geometry, [indices])[0]


def gather_conv_sets(grad_out: Tensor, x: Tensor, geometry: ConvGeometry, index_sets: Sequence[Tensor]) -> list[Tensor]:
    """`gather_conv` for several index sets at once: every row block of the gradient is formed once."""
    dtype = accumulation_dtype(grad_out, x)
    if x.shape[0] == 0:
        return [torch.zeros(indices.numel(), dtype=dtype, device=indices.device) for indices in index_sets]

    def block(first: int, last: int) -> Tensor:
        return conv_weight_gradient(grad_out, x, geometry, first, last)

    return _gather_from_blocks(index_sets, (geometry.rows, geometry.cols), block, dtype)


def gather_dense(gradient: Tensor, indices: Tensor) -> Tensor:
    """Selected entries ``[k]`` of a dense gradient of any shape, in the accumulation dtype."""
    return read_entries(gradient, indices).to(accumulation_dtype(gradient))
