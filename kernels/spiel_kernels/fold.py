"""Adds sparse deltas to a weight: each changed entry is summed in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import operation, runs_triton

Deltas = Sequence[tuple[Tensor, Tensor]]
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 as soon as one of the tensors has it."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def union_positions(deltas: Deltas) -> Tensor:
    """The positions that deltas change: int64 ``[u]``, sorted and unique."""
    if len(deltas) == 1:
        return deltas[0][0].to(torch.int64)
    return torch.unique(torch.cat([indices.to(torch.int64) for indices, _ in deltas]))


def sum_entries(originals: Tensor, positions: Tensor, deltas: Deltas) -> Tensor:
    """Base entries plus deltas, not yet rounded to the weight's dtype.

    Args:
        originals: ``[u]`` entries of the base weight.
        positions: int64 ``[u]``, the `union_positions` of these deltas.
        deltas: pairs of ``indices`` ``[k]`` and ``values`` ``[k]``.

    Returns:
        ``[u]`` in the accumulation dtype (float32, or float64 if any operand is float64).
    """
    dtype = accumulation_dtype(originals, *(values for _, values in deltas))
    if len(deltas) == 1:
        return originals.to(dtype) + deltas[0][1].to(dtype)
    sums = originals.to(dtype, copy=True)
    for indices, values in deltas:
        sums.index_add_(0, torch.searchsorted(positions, indices.to(torch.int64)), values.to(dtype))
    return sums


def adapted_entries(weight: Tensor, deltas: Deltas) -> tuple[Tensor, Tensor]:
    """The entries that deltas change, and their new values before rounding.

    Args:
        weight: base weight of any shape, strides and floating dtype.
        deltas: pairs of ``indices`` (``[k]``, sorted, unique) and ``values`` (``[k]``); several pairs add up, in
            the order given.

    Returns:
        ``(positions, values)``: int64 ``[u]`` sorted and unique (the union of all indices), and the sums in the
        accumulation dtype (float32, or float64 if any operand is float64).
    """
    positions = union_positions(deltas)
    return positions, sum_entries(read_entries(weight, positions), positions, deltas)


def apply_deltas(weight: Tensor, deltas: Deltas, out_dtype: torch.dtype | None = None) -> Tensor:
    """A copy of `weight` with all deltas added.

    Every touched entry is summed in float32 (float64 if an operand has it) and rounded once, to `out_dtype`.

    Args:
        weight: ``[*shape]``, floating; not changed.
        deltas: pairs of ``indices`` ``[k]`` and ``values`` ``[k]``.
        out_dtype: dtype of the result; the weight's own by default.

    Returns:
        A new tensor of the weight's shape.
    """
    positions, sums = adapted_entries(weight, deltas)
    out = weight.to(dtype=out_dtype or weight.dtype, copy=True)
    return write_entries(out, positions, sums.to(out.dtype))


def copy_fold(weight: Tensor, deltas: Deltas, out: Tensor) -> Tensor:
    """Write a weight plus deltas to `out`: what `apply_deltas` gives, cast to the dtype of `out`.

    Args:
        weight: ``[*shape]``, floating; not changed.
        deltas: pairs of ``indices`` ``[k]`` and ``values`` ``[k]``; several pairs add up, in the order given. One pair
            is the fast case.
        out: ``[*shape]``, floating, contiguous; overwritten.

    Returns:
        `out`.

    Raises:
        ValueError: shapes do not fit.
    """
    _copy_fold(weight, [indices for indices, _ in deltas], [values for _, values in deltas], out)
    return out


def _copy_fold_fake(weight: Tensor, indices: Sequence[Tensor], values: Sequence[Tensor], out: Tensor) -> None:
    if out.shape != weight.shape or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous and have the weight's shape {tuple(weight.shape)}, got {tuple(out.shape)} with "
            f"strides {out.stride()}"
        )


@operation("copy_fold(Tensor weight, Tensor[] indices, Tensor[] values, Tensor(a!) out) -> ()", _copy_fold_fake)
def _copy_fold(weight: Tensor, indices: Sequence[Tensor], values: Sequence[Tensor], out: Tensor) -> None:
    _copy_fold_fake(weight, indices, values, out)
    out.copy_(weight)
    deltas = list(zip(indices, values, strict=True))
    if len(deltas) == 1 and _fits_triton(weight, out, *deltas[0]):
        from .triton_backend.fold import write_adapted

        write_adapted(weight, *deltas[0], out)
    elif deltas:
        positions, sums = adapted_entries(weight, deltas)
        write_entries(out, positions, sums.to(weight.dtype).to(out.dtype))


def _fits_triton(weight: Tensor, *others: Tensor) -> bool:
    plain = weight.is_contiguous() and weight.dtype != torch.float64
    return plain and all(o.dtype != torch.float64 for o in others) and runs_triton(weight, *others)


def deltas_between(deltas: Deltas, first: int, end: int) -> list[tuple[Tensor, Tensor]]:
    """The deltas at positions ``first <= p < end``, with positions counted from `first`.

    Args:
        deltas: pairs of sorted, contiguous ``indices`` ``[k]`` and ``values`` ``[k]``.
    """
    parts = []
    for indices, values in deltas:
        bounds = torch.tensor([first, end], dtype=indices.dtype, device=indices.device)
        begin, stop = torch.searchsorted(indices, bounds).tolist()
        parts.append((indices[begin:stop] - first, values[begin:stop]))
    return parts


def read_entries(tensor: Tensor, positions: Tensor) -> Tensor:
    """The entries ``[u]`` at integer `positions` ``[u]`` of a tensor of any shape and strides."""
    if tensor.is_contiguous():
        # `index_select` takes a fifth of the time of `take` for a few thousand entries.
        return tensor.view(-1).index_select(0, positions)
    return tensor.take(positions.to(torch.int64))


def write_entries(tensor: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Write `values` ``[u]`` to the unique int64 `positions` ``[u]`` of a tensor of any shape and strides, in place."""
    if torch.are_deterministic_algorithms_enabled():
        # In this mode `put_` raises an error, as its result may depend on the order of writes: not at unique positions.
        return tensor.index_put_(torch.unravel_index(positions, tensor.shape), values)
    if tensor.is_contiguous() and not (tensor.requires_grad or values.requires_grad):
        # `scatter_` takes a fifth of the time of `put_` for a few thousand entries. It writes integers, as PyTorch's
        # CPU kernel for half-precision floats takes 150 times as long.
        bits = _INTEGERS[tensor.element_size()]
        tensor.view(-1).view(bits).scatter_(0, positions, values.view(bits))
        return tensor
    return tensor.put_(positions, values)
