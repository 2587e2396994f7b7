"""The adapted weight: base entries plus deltas, summed in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Deltas = Sequence[tuple[Tensor, Tensor]]


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 as soon as one of the tensors has it."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


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
    dtype = accumulation_dtype(weight, *(values for _, values in deltas))
    if len(deltas) == 1:
        indices, values = deltas[0]
        positions = indices.to(torch.int64)
        return positions, weight.take(positions).to(dtype) + values.to(dtype)
    positions = torch.unique(torch.cat([indices.to(torch.int64) for indices, _ in deltas]))
    sums = weight.take(positions).to(dtype)
    for indices, values in deltas:
        slots = torch.searchsorted(positions, indices.to(torch.int64))
        sums.index_add_(0, slots, values.to(dtype))
    return positions, sums


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


@contextmanager
def folded(weight: Tensor, deltas: Deltas) -> Iterator[None]:
    """Add all deltas to `weight` in place for a while, then restore its bits: no copy of the weight is made.

    The adapted entries are those of `apply_deltas`. Whoever reads the weight in between sees them, so keep it short.

    Args:
        weight: ``[*shape]``, floating, writable, tracked by nobody (a parameter's ``.data``).
        deltas: pairs of ``indices`` ``[k]`` and ``values`` ``[k]``.
    """
    positions, sums = adapted_entries(weight, deltas)
    originals = weight.take(positions)
    try:
        write_entries(weight, positions, sums.to(weight.dtype))
        yield
    finally:
        write_entries(weight, positions, originals)


def write_entries(tensor: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Write `values` ``[u]`` to the unique int64 `positions` ``[u]`` of a tensor of any shape and strides, in place."""
    if torch.are_deterministic_algorithms_enabled():
        # Unique positions leave no order to depend on, but `put_` refuses to run in this mode.
        return tensor.index_put_(torch.unravel_index(positions, tensor.shape), values)
    return tensor.put_(positions, values)
