"""Compiles kernels by launches that do not run."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from triton.runtime.jit import JITFunction

from ..matrix_kind import MatrixKind
from .every_launch import launch_all

_lock = threading.Lock()


@contextmanager
def _compiling_only() -> Iterator[list[Any]]:
    """In this thread launches compile their kernel and do not run it; yields the kernels, one for each launch."""
    kernels: list[Any] = []
    thread, launch = threading.get_ident(), JITFunction.run

    def run(function: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return launch(function, *args, grid=grid, warmup=warmup, **kwargs)
        kernels.append(launch(function, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    with _lock:
        JITFunction.run = run
        try:
            yield kernels
        finally:
            JITFunction.run = launch


def compile_ahead(kinds: Iterable[MatrixKind]) -> int:
    """See `spiel_kernels.warm_up`, for the current device."""
    with _compiling_only() as kernels:
        for kind in dict.fromkeys(kinds):
            launch_all(kind)
    return len({id(kernel) for kernel in kernels})
