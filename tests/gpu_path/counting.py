"""Counts what a GPU would be asked for: kernel launches, and waits of the host for the device.

The operations run on CPU tensors, with Triton's kernels in its interpreter. Every operation that PyTorch dispatches
counts as one launch, unless it only makes a view or reserves memory.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

# The size or the contents of what these return is known to the host only when the device has computed it.
_WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "equal",
    "is_nonzero",
    "argwhere",
}
_MEMORY_ONLY = {
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "set_",
    "resize_",
    "lift_fresh",
    # Neither launches anything.
    "promote_types",
    "scalar_tensor",
    "_unsafe_view",
    "_record_function_enter_new",
    "_record_function_exit",
}
_METHODS = ("tolist", "numpy", "cpu")


class Counts(TorchDispatchMode):
    """Counts inside its block.

    Attributes:
        launches: by name of the operation or kernel.
        waits: by the place in this project that waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if _waits(func, name, args, kwargs):
            self.wait()
        elif not (name in _MEMORY_ONLY or _is_view(func)):
            self.launches[name] += 1
        return func(*args, **kwargs)

    def wait(self) -> None:
        """Note a wait, if it is one of this project: optimizers read their own counters, which are on the CPU."""
        place = _place()
        if place is not None:
            self.waits[place] += 1


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _waits(func: Any, name: str, args: Any, kwargs: Any) -> bool:
    if name in ("index", "index_put", "index_put_", "_unsafe_index"):
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in tree_leaves(args[1]))
    if name == "repeat_interleave":
        return "Tensor" in func._overloadname and kwargs.get("output_size") is None
    return name in _WAITING


def _place() -> str | None:
    """The innermost line of this project on the call stack."""
    for frame in reversed(traceback.extract_stack()):
        if "/spiel_peft/" in frame.filename or "/spiel_kernels/" in frame.filename:
            return f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}"
    return None


@contextmanager
def counting() -> Iterator[Counts]:
    """Count everything inside the block, backward passes included."""
    counts = Counts()
    run_kernel = interpreter.GridExecutor.__call__

    def kernel(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts.launches[self.fn.__name__] += 1
        with _disable_current_modes():
            counts_in_kernel.append(True)
            try:
                return run_kernel(self, *args, **kwargs)
            finally:
                counts_in_kernel.pop()

    counts_in_kernel: list[bool] = []
    methods = {name: getattr(Tensor, name) for name in _METHODS}

    def method(name: str) -> Any:
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not counts_in_kernel:
                counts.wait()
            return methods[name](self, *args, **kwargs)

        return call

    patches = [mock.patch.object(Tensor, name, method(name)) for name in _METHODS]
    patches.append(mock.patch.object(interpreter.GridExecutor, "__call__", kernel))
    for patch in patches:
        patch.start()
    try:
        with counts:
            yield counts
    finally:
        for patch in patches:
            patch.stop()
