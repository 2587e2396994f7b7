"""One SM3-II step on the active positions of a matrix, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..index_set import row_bounds_of

# Entries per round of a row. A row of a 4096-wide matrix holds some 40 at 1% density.
_BLOCK = 128
_NAN_BITS = tl.constexpr(0x7FC00000)


@triton.jit(do_not_specialize=["cols"])
def _accumulate_kernel(
    row,  # [rows] float32, changed
    col,  # [cols] float32, the old accumulators
    col_bits,  # [cols] int32, the bits of the new ones, changed
    indices,  # [k] int32 or int64, sorted
    bounds,  # [rows + 1] int32 or int64: the first entry of each row
    gradient,  # [k]
    nu,  # [k] float32, written
    cols,
    BLOCK: tl.constexpr,
):
    # One program per row, which alone reads and writes its accumulator. Columns are shared, so their old values stay
    # apart from the new ones. Bits of floats that are not negative order as the floats do, and a maximum does not
    # depend on the order of its operands: the result is the same in every run.
    program = tl.program_id(0)
    begin = tl.load(bounds + program)
    end = tl.load(bounds + program + 1)
    first = program.to(tl.int64) * cols
    old = tl.load(row + program)
    most = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(begin, end, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        inside = slots < end
        position = tl.load(indices + slots, mask=inside, other=0).to(tl.int64)
        column = tl.where(inside, position - first, 0)
        g = tl.load(gradient + slots, mask=inside, other=0.0).to(tl.float32)
        known = tl.load(col + column, mask=inside, other=0.0)
        value = tl.minimum(old, known, propagate_nan=tl.PropagateNan.ALL) + g * g
        tl.store(nu + slots, value, mask=inside)
        # NaN above all numbers, whatever its sign.
        bits = tl.where(value == value, value.to(tl.int32, bitcast=True), _NAN_BITS)
        tl.atomic_max(col_bits + column, bits, mask=inside, sem="relaxed")
        most = tl.maximum(most, tl.where(inside, bits, 0))
    old_bits = tl.where(old == old, old.to(tl.int32, bitcast=True), _NAN_BITS)
    best = tl.maximum(tl.max(most, axis=0), old_bits)
    tl.store(row + program, best.to(tl.float32, bitcast=True))


def sm3_accumulate_(row: Tensor, col: Tensor, indices: Tensor, gradient: Tensor) -> Tensor:
    """See `spiel_kernels.sm3_accumulate_`; the accumulators are float32 and contiguous."""
    nu = torch.empty(indices.shape, dtype=row.dtype, device=row.device)
    if indices.numel() == 0:
        return nu
    rows, cols = row.numel(), col.numel()
    indices = indices.contiguous()
    new_col = col.clone()
    with torch.cuda.device_of(row):
        _accumulate_kernel[(rows,)](
            row,
            col,
            new_col.view(torch.int32),
            indices,
            row_bounds_of(indices, rows, cols),
            gradient.detach().contiguous(),
            nu,
            cols,
            BLOCK=_BLOCK,
            num_warps=1,
            enable_fp_fusion=False,  # every step rounds, as it does in PyTorch
        )
    col.copy_(new_col)
    return nu
