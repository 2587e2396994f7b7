"""Dequantizes a matrix and adds one sparse delta to it, in one kernel.

A program writes a run of consecutive elements, waits for its own stores, and then computes the entries of that run that
have a delta anew. Indices are sorted, so `bounds` holds the slot at which each run begins. Programs share no element,
so nothing is atomic.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import quantized_layout
from ..index_set import PerIndexSet
from ..quantized_layout import Packed4bit, code_table

# Elements per program, deltas per round, and warps: a thread reads 4 bytes and writes 8 neighbouring elements.
BLOCK = 2048
CHUNK = 256
WARPS = 8
RECIPROCAL_127 = tl.constexpr(quantized_layout.RECIPROCAL_127)

_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _scale(
    blocks,  # int64, any shape: which scales
    inside,  # bool, same shape
    absmax,  # [n_scales] float32, or uint8 if NESTED
    nested_code,  # [256] float32
    nested_absmax,  # [ceil(n_scales / NESTED)] float32
    nested_offset,  # [] float32
    NESTED: tl.constexpr,  # scales to a nested scale; 0: not nested
):
    if NESTED > 0:
        code = tl.load(absmax + blocks, mask=inside, other=0).to(tl.int32)
        outer = tl.load(nested_absmax + blocks // NESTED, mask=inside, other=0.0)
        scale = tl.load(nested_code + code) * outer + tl.load(nested_offset)
    else:
        scale = tl.load(absmax + blocks, mask=inside, other=0.0)
    return scale


@triton.jit
def _load_deltas(
    indices,  # [k] int32 or int64
    values,  # [k] float32, bfloat16 or float16
    start,  # the first one
    end,  # exclusive
    CHUNK: tl.constexpr,
):
    slots = start + tl.arange(0, CHUNK)
    inside = slots < end
    position = tl.load(indices + slots, mask=inside, other=0).to(tl.int64)
    delta = tl.load(values + slots, mask=inside, other=0.0).to(tl.float32)
    return position, delta, inside


@triton.jit
def _entries_4bit(
    position,  # [CHUNK] int64
    inside,  # [CHUNK] bool
    packed,
    absmax,
    nested_code,
    nested_absmax,
    nested_offset,
    code,
    DTYPE: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
):
    byte = tl.load(packed + position // 2, mask=inside, other=0).to(tl.int32)
    nibble = tl.where(position % 2 == 0, byte >> 4, byte & 15)
    blocks = position // BLOCKSIZE
    scale = _scale(blocks, inside, absmax, nested_code, nested_absmax, nested_offset, NESTED)
    return (tl.load(code + nibble) * scale).to(DTYPE).to(tl.float32)


@triton.jit
def _fold_4bit_kernel(
    packed,  # [n_bytes] uint8
    absmax,  # [n_scales] float32, or uint8 if NESTED
    nested_code,  # [256] float32
    nested_absmax,  # [ceil(n_scales / NESTED)] float32
    nested_offset,  # [] float32
    code,  # [16] float32
    indices,  # [k] int32 or int64
    values,  # [k] float32, bfloat16 or float16
    bounds,  # [programs + 1] int32 or int64: the first delta of each program
    out,  # [numel] floating
    numel,
    n_bytes,
    n_scales,
    DTYPE: tl.constexpr,
    NESTED: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    SCALES: tl.constexpr = BLOCK // BLOCKSIZE
    HALF: tl.constexpr = BLOCKSIZE // 2
    program = tl.program_id(0).to(tl.int64)
    if FOLD:
        begin = tl.load(bounds + program)
        end = tl.load(bounds + program + 1)
    blocks = program * SCALES + tl.arange(0, SCALES)
    address = blocks[:, None] * HALF + tl.arange(0, HALF)[None, :]
    both = tl.load(packed + address, mask=address < n_bytes, other=0).to(tl.int32)
    scales = _scale(blocks, blocks < n_scales, absmax, nested_code, nested_absmax, nested_offset, NESTED)
    if FOLD:
        # Early, to wait for these while the elements are on their way: most programs have no more than one chunk.
        position, delta, inside = _load_deltas(indices, values, begin, end, CHUNK)
    first = (tl.load(code + (both >> 4)) * scales[:, None]).to(DTYPE)
    second = (tl.load(code + (both & 15)) * scales[:, None]).to(DTYPE)
    positions = blocks[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    weight = tl.interleave(first, second).to(tl.float32)
    tl.store(out + positions, weight.to(out.dtype.element_ty), mask=positions < numel)
    if FOLD:
        entry = _entries_4bit(
            position, inside, packed, absmax, nested_code, nested_absmax, nested_offset, code, DTYPE, NESTED, BLOCKSIZE
        )
        # What follows overwrites what other threads of this program have just stored.
        tl.debug_barrier()
        tl.store(out + position, (entry + delta).to(out.dtype.element_ty), mask=inside)
        for start in range(begin + CHUNK, end, CHUNK):
            position, delta, inside = _load_deltas(indices, values, start, end, CHUNK)
            entry = _entries_4bit(
                position,
                inside,
                packed,
                absmax,
                nested_code,
                nested_absmax,
                nested_offset,
                code,
                DTYPE,
                NESTED,
                BLOCKSIZE,
            )
            tl.store(out + position, (entry + delta).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _fold_8bit_kernel(
    weight,  # [rows, cols] int8
    scales,  # [rows] float32
    indices,  # [k] int32 or int64
    values,  # [k] float32, bfloat16 or float16
    bounds,  # [programs + 1] int32 or int64: the first delta of each program
    out,  # [rows, cols] floating
    cols,
    per_row,  # programs per row
    FOLD: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0)
    if FOLD:
        begin = tl.load(bounds + program)
        end = tl.load(bounds + program + 1)
    row = (program // per_row).to(tl.int64)
    scale = tl.load(scales + row)
    col = (program % per_row) * BLOCK + tl.arange(0, BLOCK)
    start_of_row = row * cols
    entries = tl.load(weight + start_of_row + col, mask=col < cols, other=0).to(tl.float32)
    if FOLD:
        # Early, to wait for these while the elements are on their way: most programs have no more than one chunk.
        position, delta, inside = _load_deltas(indices, values, begin, end, CHUNK)
    entries = entries * scale * RECIPROCAL_127
    tl.store(out + start_of_row + col, entries.to(out.dtype.element_ty), mask=col < cols)
    if FOLD:
        entry = tl.load(weight + position, mask=inside, other=0).to(tl.float32) * scale * RECIPROCAL_127
        # What follows overwrites what other threads of this program have just stored.
        tl.debug_barrier()
        tl.store(out + position, (entry + delta).to(out.dtype.element_ty), mask=inside)
        for start in range(begin + CHUNK, end, CHUNK):
            position, delta, inside = _load_deltas(indices, values, start, end, CHUNK)
            entry = tl.load(weight + position, mask=inside, other=0).to(tl.float32) * scale * RECIPROCAL_127
            tl.store(out + position, (entry + delta).to(out.dtype.element_ty), mask=inside)


@functools.lru_cache(maxsize=64)
def _run_starts(rows: int, cols: int, run: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Positions at which the runs of a matrix begin, every `run` elements of every row, and its end: ``[runs + 1]``.

    Made on the CPU: the copy to the device is complete on return, whichever stream uses it later.
    """
    starts = torch.arange(rows, dtype=torch.int64)[:, None] * cols + torch.arange(0, cols, run, dtype=torch.int64)
    with torch.inference_mode(False):
        return torch.cat([starts.flatten(), torch.tensor([rows * cols])]).to(dtype).to(device)


_known_bounds: PerIndexSet[Tensor] = PerIndexSet()


def _bounds(indices: Tensor, rows: int, cols: int, run: int) -> Tensor:
    """How many indices lie before each run of a matrix, and before its end: ``[runs + 1]``."""

    def search() -> Tensor:
        starts = _run_starts(rows, cols, run, indices.dtype, indices.device)
        return torch.searchsorted(indices, starts, out_int32=indices.numel() < 2**31)

    return _known_bounds.get(indices, (rows, cols, run), search)


def _delta_arguments(
    delta: tuple[Tensor, Tensor] | None, rows: int, cols: int, run: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if delta is None:
        return None, None, None
    indices, values = delta[0].contiguous(), delta[1].contiguous()
    return indices, values, _bounds(indices, rows, cols, run)


def launch_4bit(weight: Packed4bit, delta: tuple[Tensor, Tensor] | None, out: Tensor) -> None:
    """Write `weight`, plus at most one delta, to `out` ``[rows, cols]``.

    Args:
        delta: ``indices`` ``[k]`` int32 or int64, sorted and unique; ``values`` ``[k]`` of at most 32 bits.
    """
    numel, nested = weight.numel, weight.nested
    if numel == 0:
        return
    block = max(BLOCK, weight.blocksize)
    indices, values, bounds = _delta_arguments(delta, 1, numel, block)
    with torch.cuda.device_of(out):
        _fold_4bit_kernel[(triton.cdiv(numel, block),)](
            weight.bytes,
            weight.absmax,
            nested.code if nested is not None else None,
            nested.absmax if nested is not None else None,
            nested.offset if nested is not None else None,
            code_table(weight.quant_type, out.device),
            indices,
            values,
            bounds,
            out,
            numel,
            (numel + 1) // 2,
            weight.blocks,
            DTYPE=_TRITON_DTYPES[weight.dtype],
            NESTED=nested.blocksize if nested is not None else 0,
            FOLD=delta is not None,
            BLOCKSIZE=weight.blocksize,
            BLOCK=block,
            CHUNK=CHUNK,
            num_warps=WARPS,
            enable_fp_fusion=False,  # every step rounds, as it does in PyTorch
        )


def launch_8bit(weight: Tensor, scales: Tensor, delta: tuple[Tensor, Tensor] | None, out: Tensor) -> None:
    """Write 8-bit rows, plus at most one delta, to `out` ``[rows, cols]``.

    Args:
        weight: ``[rows, cols]`` int8; scales: ``[rows]`` float32.
        delta: as in `launch_4bit`.
    """
    rows, cols = weight.shape
    if out.numel() == 0:
        return
    block = min(BLOCK, triton.next_power_of_2(cols))
    indices, values, bounds = _delta_arguments(delta, rows, cols, block)
    per_row = triton.cdiv(cols, block)
    with torch.cuda.device_of(out):
        _fold_8bit_kernel[(rows * per_row,)](
            weight.contiguous(),
            scales.contiguous(),
            indices,
            values,
            bounds,
            out,
            cols,
            per_row,
            FOLD=delta is not None,
            BLOCK=block,
            CHUNK=CHUNK,
            num_warps=WARPS,
            enable_fp_fusion=False,  # every step rounds, as it does in PyTorch
        )
