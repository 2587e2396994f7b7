"""Write the entries of a weight that a delta changes into a copy of it, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit(do_not_specialize=["k"])
def _write_adapted_kernel(
    weight,  # [numel], contiguous
    indices,  # [k] int32 or int64
    values,  # [k]
    out,  # [numel], contiguous, changed
    k,
    BLOCK: tl.constexpr,
):
    # out[p] = round(weight[p] + value), summed in float32, rounded to the weight's dtype
    slots = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slots < k
    positions = tl.load(indices + slots, mask=inside, other=0).to(tl.int64)
    original = tl.load(weight + positions, mask=inside, other=0.0)
    total = original.to(tl.float32) + tl.load(values + slots, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(weight.dtype.element_ty)
    tl.store(out + positions, rounded.to(out.dtype.element_ty), mask=inside)


def write_adapted(weight: Tensor, indices: Tensor, values: Tensor, out: Tensor) -> None:
    """Write ``round(weight + values)`` to the entries `indices` ``[k]`` of `out`; both matrices contiguous."""
    k = indices.numel()
    if k == 0:
        return
    grid = (triton.cdiv(k, _BLOCK),)
    with torch.cuda.device_of(out):
        _write_adapted_kernel[grid](
            weight, indices.contiguous(), values.detach().contiguous(), out, k, BLOCK=_BLOCK, num_warps=4
        )
