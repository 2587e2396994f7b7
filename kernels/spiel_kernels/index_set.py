"""Draws and checks index sets, the positions of sparse deltas.

An index set is a one-dimensional integer tensor of flat positions in a weight: sorted, unique and in range. Worked
example, a 2 x 3 weight of which the entries marked x are trained::

    [[.  x  .]      positions  0 1 2
     [x  .  x]]                3 4 5      index set = [1, 3, 5]
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .dispatch import on_host

T = TypeVar("T")

_AS_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)


def sorted_order(keys: Tensor, descending: bool = False) -> Tensor:
    """Slots in the order of their keys; among equal keys the earlier slot comes first, also in descending order.

    On a CPU NumPy sorts, in a tenth of the time that PyTorch's stable sort takes.

    Args:
        keys: ``[n]``, floating or integer, no NaN.

    Returns:
        int64 ``[n]``.
    """
    ordered = _as_int32(keys) if on_host(keys) else None
    if ordered is None:
        return torch.sort(keys, stable=True, descending=descending).indices
    # Key and slot in one number, so that no two are equal and any sort is stable.
    wide = ordered.to(torch.int64)
    packed = (~wide if descending else wide) * (1 << 32) + torch.arange(keys.numel())
    in_order = packed.numpy()
    in_order.sort()
    return packed.bitwise_and_((1 << 32) - 1)


def _as_int32(keys: Tensor) -> Tensor | None:
    """The keys as integers of 32 bits that sort in the same order; None if they do not fit."""
    if type(keys) is not Tensor or keys.numel() >= 1 << 31:
        return None
    if keys.dtype in _AS_FLOAT32:
        bits = (keys.detach().to(torch.float32) + 0.0).view(torch.int32)  # -0.0 becomes 0.0
        # Of negative floats larger bits mean a smaller number.
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if keys.dtype in (torch.int32, torch.int16, torch.uint8):
        return keys
    if keys.dtype == torch.int64 and keys.numel():
        low, high = torch.aminmax(keys)
        return keys if -(1 << 31) <= int(low) and int(high) < 1 << 31 else None
    return None


def true_slots(mask: Tensor) -> Tensor:
    """int64 slots at which a one-dimensional bool tensor is True, ascending."""
    if type(mask) is Tensor and on_host(mask):
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().flatten()


def index_dtype(numel: int) -> torch.dtype:
    """The narrowest supported dtype for positions in a weight of `numel` elements: int32 below 2**31, else int64."""
    return torch.int32 if numel < 2**31 else torch.int64


def rows_and_columns(positions: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """Rows and columns, int64 ``[n]``, of flat positions ``[n]`` in a matrix with `cols` columns and < 2**50 entries.

    A product in float64 is faster than an integer division. Adding a half keeps the quotient away from the next
    integer by more than its rounding error.
    """
    rows = positions.to(torch.float64).add_(0.5).mul_(1.0 / max(1, cols)).to(torch.int64)
    return rows, torch.sub(positions.to(torch.int64), rows, alpha=cols)


def row_bounds(indices: Tensor, rows: int, cols: int, block_rows: int = 1) -> Tensor:
    """Slot of the first position in each block of rows, and the number of positions: int64 ``[blocks + 1]``.

    Args:
        indices: ``[k]`` sorted flat positions in ``[rows, cols]``.
        block_rows: rows of a block; the last block may have fewer.
    """
    return _row_bounds_as(indices, rows, cols, block_rows, torch.int64)


def _row_bounds_as(indices: Tensor, rows: int, cols: int, block_rows: int, dtype: torch.dtype) -> Tensor:
    """`row_bounds` as int32 or int64."""
    step = block_rows * max(1, cols)
    blocks = -(-rows // block_rows)
    if blocks * step >= 2**31:  # int32 cannot hold the last start
        indices = indices.to(torch.int64)
    starts = torch.arange(0, blocks * step + 1, step, dtype=indices.dtype, device=indices.device)
    if rows % block_rows:
        starts.clamp_(max=rows * cols)
    return torch.searchsorted(indices, starts, out_int32=dtype == torch.int32)


def row_bounds_of(indices: Tensor, rows: int, cols: int) -> Tensor:
    """int32 `row_bounds` of single rows, made once for an index set (int64 for 2**31 positions or more)."""
    dtype = index_dtype(indices.numel())
    return _known_bounds.get(indices, (rows, cols), lambda: _row_bounds_as(indices, rows, cols, 1, dtype))


class PerIndexSet(Generic[T]):
    """Remembers what was computed from an index set, until the tensor dies or is written to (other than by ``.data``).

    It keeps one result per tensor: a result for another key takes the place of the earlier one.
    """

    def __init__(self) -> None:
        self._known = WeakIdKeyDictionary()

    def get(self, indices: Tensor, key: tuple[Hashable, ...], compute: Callable[[], T]) -> T:
        """The result of `compute` for these indices and this key, computed anew only if it is not known."""
        found = self.known(indices, key)
        return self.keep(indices, key, compute()) if found is None else found

    def keep(self, indices: Tensor, key: tuple[Hashable, ...], result: T) -> T:
        """Remember a result, which is not None, and return it."""
        if not indices.is_inference():  # an inference tensor has no version, so a write to it would go unnoticed
            self._known[indices] = ((indices._version, *key), result)
        return result

    def known(self, indices: Tensor, key: tuple[Hashable, ...]) -> T | None:
        """The result for these indices and this key if it is known, else None."""
        known = None if indices.is_inference() else self._known.get(indices)
        return known[1] if known is not None and known[0] == (indices._version, *key) else None


_known_bounds: PerIndexSet[Tensor] = PerIndexSet()


def sample_positions(numel: int, k: int, generator: torch.Generator) -> Tensor:
    """Draw `k` of `numel` positions uniformly, without replacement.

    Args:
        numel: size of the weight.
        k: how many positions, ``0 <= k <= numel``.
        generator: CPU generator; the result depends on nothing else.

    Returns:
        int64 ``[k]`` on the CPU, sorted and unique.
    """
    if not 0 <= k <= numel:
        raise ValueError(f"k must be between 0 and numel={numel}, got {k}")
    if 2 * k > numel:
        # So many draws would often repeat a position. Fewer positions are left out, so draw those.
        left_out = sample_positions(numel, numel - k, generator)
        mask = torch.ones(numel, dtype=torch.bool)
        mask[left_out] = False
        return true_slots(mask)
    drawn = torch.empty(0, dtype=torch.int64)
    while drawn.numel() < k:
        missing = k - drawn.numel()
        extra = torch.randint(numel, (missing + missing // 8 + 16,), generator=generator)
        drawn = torch.unique(torch.cat([drawn, extra]))
    surplus = drawn.numel() - k
    if surplus:
        # A uniform choice of the drawn positions is dropped, so that those kept are a uniform choice too.
        keep = torch.ones(drawn.numel(), dtype=torch.bool)
        keep[torch.randperm(drawn.numel(), generator=generator)[:surplus]] = False
        drawn = drawn[keep]
    return drawn


def check_index_set(indices: Tensor, numel: int | None) -> str | None:
    """Describe the first fault of an index set; None if it has none.

    Args:
        indices: the tensor to check, any dtype and shape, on any device but meta.
        numel: number of entries of the weight; None leaves the largest position and the dtype's width unchecked.

    Returns:
        A phrase that continues "<tensor name> ...", or None.
    """
    if indices.dim() != 1:
        return f"must be one-dimensional, got shape {tuple(indices.shape)}"
    allowed = (torch.int32, torch.int64) if numel is None else (index_dtype(numel),)
    if indices.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        return f"must have dtype {names}, got {indices.dtype}"
    if indices.numel() == 0:
        return None
    low, high = int(indices.min()), int(indices.max())
    if low < 0:
        return f"has a negative position ({low})"
    if numel is not None and high >= numel:
        return f"has a position out of range ({high} in a weight of {numel} elements)"
    steps = indices[1:] - indices[:-1]
    if bool((steps < 0).any()):
        return "is not sorted"
    if bool((steps == 0).any()):
        position = int(indices[1:][steps == 0][0])
        return f"holds a position more than once ({position})"
    return None


def seeded_generator(seed: int, module_name: str, cycle: int) -> torch.Generator:
    """A CPU generator for one module and cycle.

    Python's own `hash` of a string differs from process to process, which would make ranks and resumed runs differ.

    Args:
        seed: the config's seed.
        module_name: full name of the adapted module.
        cycle: 0 for the initial positions, n for the n-th close.
    """
    digest = hashlib.blake2b(f"{seed}\0{module_name}\0{cycle}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
