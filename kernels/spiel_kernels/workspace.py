"""Lends memory that all layers share to a weight that is needed for one operation only.

An adapted weight often lives for one matrix product. Allocating it anew for every layer costs page faults on a CPU
(several times the work itself) and fragments the memory of a GPU. So buffers are lent. A buffer belongs to its borrower
until the operation that reads it has been issued; then the next borrower gets it. It grows to the largest weight asked
for.

Two borrowers never share a buffer, whether they are two threads or two nested operations. On a GPU a buffer returns to
the stream it was used on, whose operations run in the order in which they were issued. Usually one weight is needed at
a time, and there is one buffer per device, dtype and stream.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

Key: TypeAlias = tuple[torch.device, torch.dtype, int]

# Flat buffers that are not lent, by device, dtype and stream.
_free: dict[Key, list[Tensor]] = {}
_lock = threading.Lock()


@contextmanager
def workspace(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Iterator[Tensor]:
    """Lend an uninitialized tensor for the length of a block, in which the operations that read it are issued.

    Args:
        shape: of the tensor; sizes may be 0.
        dtype: its dtype.
        device: of the tensor; "cuda" is the current CUDA device.

    Yields:
        A contiguous tensor of that shape, not tracked by autograd.
    """
    if any(size < 0 for size in shape):
        raise ValueError(f"sizes must not be negative, got {tuple(shape)}")
    key = _key(torch.device(device), dtype)
    numel = math.prod(shape)
    buffer = _borrow(key, numel)
    try:
        yield buffer[:numel].view(tuple(shape))
    finally:
        if type(buffer) is Tensor:  # a fake tensor must not be lent again
            with _lock:
                _free.setdefault(key, []).append(buffer)


def _key(device: torch.device, dtype: torch.dtype) -> Key:
    if device.type != "cuda":
        return device, dtype, 0
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device, dtype, torch.cuda.current_stream(device).cuda_stream


def _borrow(key: Key, numel: int) -> Tensor:
    with _lock:
        free = _free.get(key)
        buffer = free.pop() if free else None
    if buffer is None or buffer.numel() < numel:
        buffer = None  # freed before the larger buffer is allocated
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside it
            buffer = torch.empty(numel, dtype=key[1], device=key[0])
    return buffer


def release_workspaces() -> None:
    """Drop all buffers that are not lent. Later requests allocate anew."""
    with _lock:
        _free.clear()


def workspace_nbytes(device: torch.device | str | None = None) -> int:
    """Bytes of all buffers that are not lent.

    Args:
        device: count this device only ("cuda": all CUDA devices); None counts all.
    """
    wanted = None if device is None else torch.device(device)
    with _lock:
        buffers = [buffer for free in _free.values() for buffer in free]
    return sum(
        buffer.numel() * buffer.element_size()
        for buffer in buffers
        if wanted is None or (buffer.device.type == wanted.type and wanted.index in (None, buffer.device.index))
    )
