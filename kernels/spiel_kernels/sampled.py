"""Computes selected entries of ``a.T @ b`` on the CPU, chunk by chunk of tokens, and no other entries."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .index_set import row_bounds_of
from .workspace import workspace


class _Slot:
    """The last copy, with the tensor it was made from and that tensor's version then, as long as the tensor lives."""

    def __init__(self) -> None:
        self.kept: tuple[weakref.ref[Tensor], int, Tensor] | None = None


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.slot = _Slot()


_last = _PerThread()


def turned(x: Tensor) -> Tensor:
    """A copy of a matrix, or of a batch of rows, whose columns lie in memory one after the other.

    The dot products of the sampled gather read columns. A transposing copy is scalar work and takes as long as they
    do. Made in the forward pass, it finds its input in the caches, and layers that share an input (query, key and
    value; gate and up) share the copy. It is kept for the backward pass in place of the activation, so memory stays the
    same.

    Args:
        x: ``[..., cols]`` on the CPU.

    Returns:
        ``[N, cols]`` with strides ``(1, N)``, outside of autograd. Asked again for the same tensor it returns the same
        copy, unless the tensor was written to or another one was asked for in between.
    """
    slot = _last.slot
    kept = slot.kept
    if kept is not None and kept[0]() is x and kept[1] == x._version:
        return kept[2]
    copy = x.detach().reshape(-1, x.shape[-1]).T.contiguous().T
    if not x.is_inference():  # an inference tensor has no version, so a write to it would go unnoticed
        owner = weakref.ref(slot)

        def forget(reference: weakref.ref[Tensor]) -> None:
            slot = owner()
            if slot is not None and slot.kept is not None and slot.kept[0] is reference:
                slot.kept = None

        slot.kept = weakref.ref(x, forget), x._version, copy
    return copy


def is_turned(x: Tensor) -> bool:
    """Whether the columns of a matrix lie in memory one after the other."""
    return x.T.is_contiguous()


CHUNK_TOKENS = 256
# Up to so many rows and columns together, a chunk has twice as many tokens: the copies still fit into the caches.
_SMALL = 2304


def _chunk_tokens(width: int) -> int:
    return 2 * CHUNK_TOKENS if width <= _SMALL else CHUNK_TOKENS


@dataclass(frozen=True)
class SampledCost:
    """Time of the sampled gather over that of the dense product: ``per_size * (rows + cols) / (rows * cols) +
    per_density * density``.

    The first term is the transposed copies, the second the dot products. Fitted by ``python -m benchmarks ops``.
    """

    per_size: float
    per_density: float

    def over_dense(self, rows: int, cols: int, k: int) -> float:
        numel = rows * cols
        return self.per_size * (rows + cols) / numel + self.per_density * k / numel


# A little above what the bundled model's shapes gave on two cores with AVX-512 (45 and 3.5, `SmolLM2` at 512 tokens).
CPU_COST = SampledCost(per_size=60.0, per_density=4.5)
# The sampled gather is chosen if its estimated time is below this share of the dense product's.
WORTH_IT = 0.95


def sampled_pays(rows: int, cols: int, k: int) -> bool:
    """Whether `gather_sampled` is expected to beat the dense product in row blocks for k of rows * cols entries.

    It depends on sizes alone, never on a clock: the two methods round differently, and a run must be repeatable.
    """
    return CPU_COST.over_dense(rows, cols, k) < WORTH_IT


@functools.cache
def _quiet_first_use() -> None:
    """Have PyTorch give its warning that CSR tensors are in beta, which comes once per process, where it is ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = torch.zeros(1, dtype=torch.int32)
        torch.sparse_csr_tensor(torch.tensor([0, 1], dtype=torch.int32), one, one.float(), (1, 1))


def _pattern(indices: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """A CSR matrix of zeros with the given sorted flat positions."""
    return torch.sparse_csr_tensor(
        row_bounds_of(indices, rows, cols),
        torch.fmod(indices, cols).to(torch.int32),  # faster than `remainder`, and the same for positions
        torch.zeros(indices.numel(), dtype=dtype, device=indices.device),
        (rows, cols),
        check_invariants=False,
    )


def _transposed(
    operands: tuple[Tensor, Tensor], as_they_are: Sequence[bool], copies: Tensor | None, start: int, count: int
) -> list[Tensor]:
    """Both operands' tokens ``start .. start + count``, ``[rows, count]`` and ``[cols, count]``."""
    out, used = [], 0
    for x, as_it_is in zip(operands, as_they_are, strict=True):
        part = x if count == x.shape[0] else x[start : start + count]
        if as_it_is:
            out.append(part.T)
            continue
        copy = copies[used : used + x.shape[1]]
        used += x.shape[1]
        if count != copy.shape[1]:
            copy = copy[:, :count]
        out.append(copy.copy_(part.T))
    return out


def gather_sampled(a: Tensor, b: Tensor, index_sets: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Selected entries of ``a.T @ b`` for several index sets at once, which share the transposed copies.

    Args:
        a: ``[N, rows]``, floating; b: ``[N, cols]``; on the CPU, any strides, N may be 0.
        index_sets: each ``[k]`` sorted flat positions in ``[rows, cols]``.
        dtype: float32 or float64, in which the products are summed.

    Returns:
        One ``[k]`` in `dtype` per index set.
    """
    _quiet_first_use()
    tokens, rows, cols = a.shape[0], a.shape[1], b.shape[1]
    sums = [_pattern(indices, rows, cols, dtype) if indices.numel() else None for indices in index_sets]
    wanted = [total for total in sums if total is not None]
    chunk = min(_chunk_tokens(rows + cols), tokens)
    whole = chunk == tokens
    # The dot products run along the rows of the transposed operands. Calls are few: each takes several microseconds
    # after a large matrix product, which leaves nothing else in the caches.
    as_they_are = [whole and x.dtype == dtype and is_turned(x) for x in (a, b)]
    width = sum(0 if as_it_is else x.shape[1] for x, as_it_is in zip((a, b), as_they_are, strict=True))
    with workspace((width, chunk), dtype, a.device) if width else nullcontext() as copies:
        for start in range(0, tokens, chunk or 1):
            count = min(chunk, tokens - start)
            left, right = _transposed((a, b), as_they_are, copies, start, count)
            right = right.T
            for total in wanted:
                torch.sparse.sampled_addmm(total, left, right, out=total)
    return [torch.zeros(0, dtype=dtype, device=a.device) if total is None else total.values() for total in sums]
