"""Chooses between PyTorch and Triton for each operation, and registers operations for `torch.compile`.

Every operation has a plain PyTorch implementation, which is the oracle of its tests and the path on CPUs; some have a
Triton one for CUDA. By default CUDA tensors go to Triton where it is installed and everything else to PyTorch. An
explicit choice (`use_backend`, or the environment variable SPIEL_KERNELS, read once) must work or raise; only the
automatic one falls back.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")
NAMESPACE = "spiel_kernels"

F = TypeVar("F", bound=Callable[..., Any])


def new_library(namespace: str) -> torch.library.Library:
    """A library for the operators of a namespace; replaces the library of an earlier import of the same package."""
    libraries = torch.library.__dict__.setdefault("_spiel_libraries", {})
    earlier = libraries.pop(namespace, None)
    if earlier is not None:
        earlier._destroy()
    libraries[namespace] = torch.library.Library(namespace, "DEF")
    return libraries[namespace]


_library = new_library(NAMESPACE)
_forced: str | None = None


@functools.cache
def _from_environment() -> str:
    # Cached: reading the environment takes as long as a small operation.
    name = os.environ.get("SPIEL_KERNELS", "auto")
    if name not in BACKENDS:
        raise ValueError(f"SPIEL_KERNELS must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the implementation of all operations for the length of a block, in all threads of the process.

    Args:
        name: "auto", "torch" or "triton". With ``TRITON_INTERPRET=1`` in the environment from the start, "triton" runs
            on CPU tensors too.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@functools.cache
def triton_installed() -> bool:
    """Whether the package triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_host(tensor: Tensor) -> bool:
    """Whether the contents of a tensor can be looked at without waiting for a device.

    Where Triton's interpreter was chosen, CPU tensors are treated as those of a GPU, so that its path can be tested.
    """
    return tensor.device.type == "cpu" and (_forced or _from_environment()) != "triton"


def runs_triton(*tensors: Tensor) -> bool:
    """Whether an operation on these tensors runs its Triton implementation.

    Raises:
        RuntimeError: Triton was chosen explicitly and cannot run here.
    """
    name = _forced or _from_environment()
    if name == "torch" or (name == "auto" and not tensors[0].is_cuda):
        return False  # the usual case comes first: layers ask several times in every pass
    on_gpu = all(tensor.device.type == "cuda" for tensor in tensors)
    if name == "auto":
        return on_gpu and triton_installed()
    if not triton_installed():
        raise RuntimeError("the backend 'triton' was chosen, but the package triton is not installed")
    if not on_gpu and not interpreting():
        devices = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
        raise RuntimeError(
            f"the backend 'triton' was chosen, but the tensors are on {devices}; Triton runs on CUDA, or with "
            "TRITON_INTERPRET=1 in its interpreter"
        )
    return True


def tf32_allowed() -> bool:
    """Whether matrix products of float32 tensors on a GPU may round their operands to TF32.

    PyTorch 2.9 has another setting than earlier versions, and reading the old one raises once the new one was set, as
    transformers' ``TrainingArguments(tf32=True)`` does.
    """
    if not hasattr(torch.backends, "fp32_precision"):
        return torch.backends.cuda.matmul.allow_tf32
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def tags_of(schema: str, decides_at_run_time: bool = False) -> tuple[torch.Tag, ...]:
    """The tags of an operator that `torch.compile` should know.

    Out of CUDA graphs stay operators that write to their arguments in place, as a replay would write to the memory of
    the recording, and those that decide at run time what they launch. PyTorch before 2.8 does not know that tag.
    """
    tags = [torch.Tag.pt2_compliant_tag]
    if ("!)" in schema or decides_at_run_time) and hasattr(torch.Tag, "cudagraph_unsafe"):
        tags.append(torch.Tag.cudagraph_unsafe)
    return tuple(tags)


def operation(schema: str, fake: Callable[..., Any]) -> Callable[[F], F]:
    """Register a function as ``torch.ops.spiel_kernels.<name>``; under `torch.compile` calls go through that.

    Eager calls stay plain function calls: the dispatcher would cost more than a small operation does.

    Args:
        schema: ``name(Tensor a, int k) -> Tensor``, in PyTorch's schema language; mutated arguments marked.
        fake: same arguments, returns empty tensors of the output's shape, dtype and device. It may also check the
            arguments.
    """
    name = schema.partition("(")[0]

    def decorate(function: F) -> F:
        _library.define(schema, tags=tags_of(schema))
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return getattr(torch.ops.spiel_kernels, name)(*args, **kwargs)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
