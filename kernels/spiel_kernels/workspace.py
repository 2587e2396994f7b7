"""One buffer per device, dtype and stream that all layers share for a weight that is needed for one operation only.

A dequantized, adapted weight lives for one matrix product. Allocating it anew for every layer costs page faults on a
CPU (several times the work itself) and fragments the memory of a GPU; the buffer grows to the largest weight asked for
and is handed out again and again.

The rule: what `workspace` returns is valid until the next request for the same device and dtype. On a GPU operations of
one stream run in the order they were issued, so the next request may come as soon as the operation that reads the
weight has been issued; streams have buffers of their own, but two threads must not issue to the same stream at the same
time (autograd does not: the thread that called backward waits for the one that works). On a CPU every thread has
buffers of its own.
"""

from __future__ import annotations

import threading
import weakref
from typing import TypeAlias

import torch
from torch import Tensor

Key: TypeAlias = tuple[torch.device, torch.dtype, int]


class _Buffers:
    """Flat buffers by device, dtype and stream."""

    def __init__(self) -> None:
        self.flat: dict[Key, Tensor] = {}

    def take(self, key: Key, numel: int) -> Tensor:
        """The first `numel` elements of the buffer, which grows if need be."""
        buffer = self.flat.get(key)
        if buffer is not None and buffer.numel() >= numel:
            return buffer[:numel]
        buffer = None
        self.flat.pop(key, None)  # before the larger one is there, so that the two never exist together
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside it
            buffer = torch.empty(numel, dtype=key[1], device=key[0])
        if type(buffer) is Tensor:  # fake tensors must not stay
            self.flat[key] = buffer
        return buffer


class _PerThread(threading.local):
    """The CPU buffers of the current thread; they go when it ends."""

    def __init__(self) -> None:
        self.buffers = _Buffers()
        with _lock:
            _alive.add(self.buffers)


_lock = threading.Lock()
_alive: weakref.WeakSet[_Buffers] = weakref.WeakSet()
_shared = _Buffers()
_alive.add(_shared)
_per_thread = _PerThread()


def workspace(rows: int, cols: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """An uninitialized matrix in the shared buffer, valid until the next request (see above).

    Args:
        rows, cols: its shape, 0 allowed.
        dtype: its dtype.
        device: where; "cuda" is the current CUDA device.

    Returns:
        ``[rows, cols]``, contiguous, not tracked by autograd.
    """
    if rows < 0 or cols < 0:
        raise ValueError(f"rows and cols must not be negative, got {rows} and {cols}")
    device = torch.device(device)
    if device.type != "cuda":
        return _per_thread.buffers.take((device, dtype, 0), rows * cols).view(rows, cols)
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    stream = torch.cuda.current_stream(device).cuda_stream
    with _lock:
        return _shared.take((device, dtype, stream), rows * cols).view(rows, cols)


def _all_buffers() -> list[_Buffers]:
    with _lock:
        return list(_alive)


def release_workspaces() -> None:
    """Drop all buffers; their memory is free once nobody holds a view of them. Later requests allocate anew."""
    for buffers in _all_buffers():
        buffers.flat.clear()


def workspace_nbytes(device: torch.device | str | None = None) -> int:
    """Bytes that all buffers hold together, those of other threads included.

    Args:
        device: count this device only ("cuda": all CUDA devices); None counts all.
    """
    wanted = None if device is None else torch.device(device)
    return sum(
        buffer.numel() * buffer.element_size()
        for buffers in _all_buffers()
        for buffer in list(buffers.flat.values())
        if wanted is None or (buffer.device.type == wanted.type and wanted.index in (None, buffer.device.index))
    )
