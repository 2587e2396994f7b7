"""Fold a delta into a weight, and out again, in one kernel each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _fold_kernel(
    weight,  # [numel], contiguous, changed
    indices,  # [k] int32 or int64
    values,  # [k]
    originals,  # [k] weight's dtype; written unless KEPT
    k,
    KEPT: tl.constexpr,  # the originals are known from an earlier fold
    BLOCK: tl.constexpr,
):
    slots = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slots < k
    positions = tl.load(indices + slots, mask=inside, other=0).to(tl.int64)
    if KEPT:
        original = tl.load(originals + slots, mask=inside, other=0.0)
    else:
        original = tl.load(weight + positions, mask=inside, other=0.0)
        tl.store(originals + slots, original, mask=inside)
    total = original.to(tl.float32) + tl.load(values + slots, mask=inside, other=0.0).to(tl.float32)
    tl.store(weight + positions, total.to(weight.dtype.element_ty), mask=inside)


@triton.jit
def _unfold_kernel(
    weight,  # [numel], contiguous, changed
    indices,  # [k] int32 or int64
    originals,  # [k] weight's dtype
    k,
    BLOCK: tl.constexpr,
):
    slots = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slots < k
    positions = tl.load(indices + slots, mask=inside, other=0).to(tl.int64)
    tl.store(weight + positions, tl.load(originals + slots, mask=inside, other=0.0), mask=inside)


def _launch_fold(weight: Tensor, indices: Tensor, values: Tensor, originals: Tensor, kept: bool) -> None:
    k = indices.numel()
    if k == 0:
        return
    grid = (triton.cdiv(k, _BLOCK),)
    _fold_kernel[grid](
        weight, indices.contiguous(), values.detach().contiguous(), originals, k, KEPT=kept, BLOCK=_BLOCK, num_warps=4
    )


def fold_(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """See `spiel_kernels.fold_`; the weight must be contiguous."""
    originals = torch.empty(indices.shape, dtype=weight.dtype, device=weight.device)
    _launch_fold(weight, indices, values, originals, kept=False)
    return originals


def refold_(weight: Tensor, indices: Tensor, values: Tensor, originals: Tensor) -> None:
    """See `spiel_kernels.refold_`; the weight must be contiguous."""
    _launch_fold(weight, indices, values, originals.contiguous(), kept=True)


def unfold_(weight: Tensor, indices: Tensor, originals: Tensor) -> None:
    """See `spiel_kernels.unfold_`; the weight must be contiguous."""
    k = indices.numel()
    if k == 0:
        return
    grid = (triton.cdiv(k, _BLOCK),)
    _unfold_kernel[grid](weight, indices.contiguous(), originals.contiguous(), k, BLOCK=_BLOCK, num_warps=4)
