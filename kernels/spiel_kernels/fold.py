"""The adapted weight: base entries plus deltas, summed in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
        positions: int64 ``[u]``, what `union_positions` gives for these deltas.
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


def _fake_fold(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    return weight.new_empty(indices.shape)


@operation("fold_(Tensor(a!) weight, Tensor indices, Tensor values) -> Tensor", _fake_fold)
def fold_(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Add a delta to `weight` in place: no copy of the weight is made.

    Args:
        weight: ``[*shape]``, floating, any strides; changed at the given positions, to what `apply_deltas` gives.
        indices: ``[k]`` unique flat positions; values: ``[k]``.

    Returns:
        The entries as they were, ``[k]`` in the weight's dtype, for `refold_` and `unfold_`.
    """
    if _fits_triton(weight, indices, values):
        from .triton_backend import fold

        return fold.fold_(weight, indices, values)
    positions = indices.to(torch.int64)
    originals = read_entries(weight, positions)
    write_entries(weight, positions, sum_entries(originals, positions, [(indices, values)]).to(weight.dtype))
    return originals


def _fake_in_place(*args: Tensor) -> None:
    return None


@operation(
    "refold_(Tensor(a!) weight, Tensor indices, Tensor values, Tensor originals) -> ()",
    _fake_in_place,
)
def refold_(weight: Tensor, indices: Tensor, values: Tensor, originals: Tensor) -> None:
    """Write other values of a delta that is in the weight already; always from the originals, so nothing drifts.

    Args:
        weight, indices: as given to `fold_`.
        values: ``[k]``.
        originals: ``[k]``, what `fold_` returned.
    """
    if _fits_triton(weight, indices, values, originals):
        from .triton_backend import fold

        fold.refold_(weight, indices, values, originals)
        return
    positions = indices.to(torch.int64)
    write_entries(weight, positions, sum_entries(originals, positions, [(indices, values)]).to(weight.dtype))


@operation("unfold_(Tensor(a!) weight, Tensor indices, Tensor originals) -> ()", _fake_in_place)
def unfold_(weight: Tensor, indices: Tensor, originals: Tensor) -> None:
    """Undo `fold_`, bit for bit.

    Args:
        weight, indices: as given to `fold_`.
        originals: ``[k]``, what `fold_` returned.
    """
    if _fits_triton(weight, indices, originals):
        from .triton_backend import fold

        fold.unfold_(weight, indices, originals)
        return
    write_entries(weight, indices.to(torch.int64), originals)


def _fits_triton(weight: Tensor, *others: Tensor) -> bool:
    plain = weight.is_contiguous() and weight.dtype != torch.float64
    return plain and all(o.dtype != torch.float64 for o in others) and runs_triton(weight, *others)


@contextmanager
def folded(weight: Tensor, deltas: Deltas) -> Iterator[None]:
    """Add all deltas to `weight` in place for a while, then restore its bits: no copy of the weight is made.

    The adapted entries are those of `apply_deltas`. Whoever reads the weight in between sees them, so keep it short.

    Args:
        weight: ``[*shape]``, floating, writable, tracked by nobody (a parameter's ``.data``).
        deltas: pairs of ``indices`` ``[k]`` and ``values`` ``[k]``.
    """
    if len(deltas) == 1:
        indices, values = deltas[0]
        originals = fold_(weight, indices, values)
        try:
            yield
        finally:
            unfold_(weight, indices, originals)
        return
    positions = union_positions(deltas)
    originals = read_entries(weight, positions)
    sums = sum_entries(originals, positions, deltas)
    try:
        write_entries(weight, positions, sums.to(weight.dtype))
        yield
    finally:
        write_entries(weight, positions, originals)


def read_entries(tensor: Tensor, positions: Tensor) -> Tensor:
    """The entries ``[u]`` at integer `positions` ``[u]`` of a tensor of any shape and strides."""
    if tensor.is_contiguous():
        # A fifth of what `take` costs for a few thousand entries.
        return tensor.view(-1).index_select(0, positions)
    return tensor.take(positions.to(torch.int64))


def write_entries(tensor: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Write `values` ``[u]`` to the unique int64 `positions` ``[u]`` of a tensor of any shape and strides, in place."""
    if torch.are_deterministic_algorithms_enabled():
        # Unique positions leave no order to depend on, but `put_` refuses to run in this mode.
        return tensor.index_put_(torch.unravel_index(positions, tensor.shape), values)
    if tensor.is_contiguous() and not (tensor.requires_grad or values.requires_grad):
        # A fifth of what `put_` costs for a few thousand entries. As integers: half-precision floats take PyTorch's
        # slow path on CPUs (150 times the time).
        bits = _INTEGERS[tensor.element_size()]
        tensor.view(-1).view(bits).scatter_(0, positions, values.view(bits))
        return tensor
    return tensor.put_(positions, values)
