"""Records the launches of Triton kernels as the JIT would make them on a GPU, without one.

The kernels' own launch functions are called with tensors on a CPU. Triton's JIT believes in a GPU of the wanted part,
works out what it would compile - signature, constants, alignment hints, options - and is stopped before it does. So
there is no second list of launches that could fall behind. In Triton's interpreter the kernels run as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

Path = tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the function that is compiled.
        key: what the JIT looks a compiled kernel up by; another key means another compilation.
        signature: type of each argument by name, "constexpr" for constants.
        constants: values of the constants, by place in the signature.
        hints: what the compiler may assume of an argument, by place: divisible by 16.
        options: number of warps and stages, and other options of the compiler.
    """

    kernel: JITFunction
    key: str
    signature: dict[str, str]
    constants: dict[Path, Any]
    hints: dict[Path, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__


class _Driver:
    """What the JIT asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        # The JIT keeps a cache per device; no real device has this name.
        return f"recorded sm_{self._target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


def gpu_target(arch: int) -> GPUTarget:
    """The part sm_<arch>."""
    return GPUTarget("cuda", arch, 32)


def _options(specialization: str) -> dict[str, Any]:
    options = json.loads(specialization)["options"]
    for name in ("arch", "extern_libs"):  # both follow from the target
        options.pop(name, None)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


@contextmanager
def recorded(arch: int) -> Iterator[list[Launch]]:
    """Record the launches of a block, in order, as for a part sm_<arch>; compiled kernels do not run.

    Not for a process that uses a GPU at the same time: Triton's driver is replaced meanwhile.
    """
    launches: list[Launch] = []

    def hook(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        launches.append(
            Launch(
                fn.jit_function,
                key,
                dict(compile["signature"]),
                dict(compile["constants"]),
                dict(compile["configs"][0]),
                _options(compile["specialization_data"]),
            )
        )
        return True  # "compiled already": neither compile nor launch

    before = driver._active, knobs.runtime.jit_cache_hook
    interpreted = InterpretedFunction.run
    driver.set_active(_Driver(gpu_target(arch)))
    knobs.runtime.jit_cache_hook = hook
    InterpretedFunction.run = _recorded_run(interpreted)
    try:
        yield launches
    finally:
        driver._active, knobs.runtime.jit_cache_hook = before
        InterpretedFunction.run = interpreted


def _recorded_run(run: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter's launch, after the JIT was asked what it would compile for it."""
    twins: dict[Any, JITFunction] = {}

    def launch(kernel: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if kernel.fn not in twins:
            twins[kernel.fn] = JITFunction(kernel.fn, **kernel.kwargs)
        twins[kernel.fn].run(*args, grid=grid, warmup=True, **options)
        return run(kernel, *args, grid=grid, warmup=warmup, **options)

    return launch
