"""Compiles recorded launches for GPUs that are not there, and looks at the machine code that they would run.

Registers, spills and shared memory decide how many programs run at a time; an instruction that is missing shows that
the compiler understood a kernel otherwise than it was meant.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.compiler import ASTSource, CompiledKernel

from .launches import Launch, gpu_target


@dataclass(frozen=True)
class Part:
    """A GPU: the shared memory that a program may have there, and the instruction of its matrix units."""

    shared_bytes: int
    matrix_instruction: str


PARTS = {
    80: Part(163 << 10, "mma.sync"),
    90: Part(227 << 10, "wgmma.mma_async"),
    100: Part(227 << 10, "tcgen05.mma"),
}


@dataclass(frozen=True)
class MachineCode:
    """What a launch runs on one part.

    Attributes:
        registers: per thread.
        stack_bytes: per thread; more than none means that registers were spilled.
        shared_bytes: per program.
        matrix: instructions of the part's matrix units, in PTX.
        barriers: instructions that wait for all threads of a program, in PTX.
        instructions: of the machine, all of them; None if they were not counted.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    matrix: int
    barriers: int
    instructions: int | None

    def to_json(self) -> dict[str, int | None]:
        return asdict(self)


def compile_launch(launch: Launch, arch: int) -> CompiledKernel:
    """What the JIT would compile for a launch that was recorded for sm_<arch>."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.hints)
    return triton.compile(source, target=gpu_target(arch), options=launch.options)


def _ask_cuobjdump(kernel: CompiledKernel, question: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, question, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_machine_code(kernel: CompiledKernel, arch: int, count_instructions: bool = False) -> MachineCode:
    """Read a compiled kernel.

    Args:
        count_instructions: disassemble it too, which takes longer than to compile it.
    """
    usage = dict(re.findall(r"(REG|STACK):(\d+)", _ask_cuobjdump(kernel, "-res-usage")))
    ptx = kernel.asm["ptx"]
    instructions = None
    if count_instructions:
        instructions = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/ ", _ask_cuobjdump(kernel, "-sass"), flags=re.MULTILINE))
    return MachineCode(
        registers=int(usage["REG"]),
        stack_bytes=int(usage["STACK"]),
        shared_bytes=kernel.metadata.shared,
        matrix=ptx.count(PARTS[arch].matrix_instruction),
        barriers=ptx.count("bar.sync"),
        instructions=instructions,
    )


def wants_matrix_units(ttir: str) -> bool:
    """Whether a kernel multiplies matrices in a precision that matrix units have, from its Triton IR."""
    for line in ttir.splitlines():
        if " tt.dot " in line and (re.search(r"x(bf16|f16)>", line) or "inputPrecision = tf32" in line):
            return True
    return False


def barriers_hold(ptx: str, source: Iterable[str], first_line: int) -> bool:
    """Whether each barrier of a kernel separates the stores before it from those after it.

    A barrier with no stores after it, other than the kernel's only one, ends a loop: it has to follow the last store.

    Args:
        source: lines of the kernel, with ``tl.debug_barrier()`` at least once; first_line: number of the first one.
    """
    lines = [first_line + number for number, text in enumerate(source) if "tl.debug_barrier()" in text]
    return all(_barrier_holds(ptx, line, ends_loop=len(lines) > 1 and line == lines[-1]) for line in lines)


def _barrier_holds(ptx: str, barrier: int, ends_loop: bool) -> bool:
    line, events = 0, []
    for text in ptx.splitlines():
        place = re.match(r"\s*\.loc\s+\d+ (\d+) \d+(?:.*inlined_at \d+ (\d+))?", text)
        if place:
            line = int(place[2] or place[1])
        elif "bar.sync" in text:
            events.append("barrier")
        elif "st.global" in text:
            events.append("before" if line < barrier else "after")
    if "before" not in events:
        return False
    last = len(events) - 1 - events[::-1].index("before")
    if "after" not in events:
        return not ends_loop or "barrier" in events[last:]
    stores = events.index("after")
    return last < stores and "barrier" in events[last:stores]


def faults(launch: Launch, kernel: CompiledKernel, code: MachineCode, arch: int) -> list[str]:
    """What is wrong with a compiled kernel; empty if nothing is."""
    part, found = PARTS[arch], []
    if code.stack_bytes:
        found.append(f"{code.stack_bytes} bytes of registers spilled per thread")
    if code.shared_bytes > part.shared_bytes:
        found.append(f"{code.shared_bytes} bytes of shared memory, of {part.shared_bytes} on sm_{arch}")
    if wants_matrix_units(kernel.asm["ttir"]) and not code.matrix:
        found.append(f"no {part.matrix_instruction} on sm_{arch}")
    if launch.signature.get("indices") == "*i32" and re.search(r"\b(div|rem)\.[su]64", kernel.asm["ptx"]):
        found.append("positions of 32 bits are divided in 64")
    source, first_line = inspect.getsourcelines(launch.kernel.fn)
    if any("tl.debug_barrier()" in line for line in source):
        if not barriers_hold(kernel.asm["ptx"], source, first_line):
            found.append("no barrier between the stores before and after tl.debug_barrier()")
    return found


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """One launch of each that the JIT compiles a kernel of its own for, in the order in which they were recorded."""
    return list({(launch.name, launch.key): launch for launch in launches}.values())


def describe(launch: Launch) -> dict[str, str]:
    """Type, constant value and hint of every argument, by name."""
    described = {}
    for place, (name, kind) in enumerate(launch.signature.items()):
        value: Any = launch.constants.get((place,))
        text = str(value).removeprefix("triton.language.") if kind == "constexpr" else kind.removeprefix("*")
        hinted = kind != "constexpr" and not kind.startswith("*") and launch.hints.get((place,))
        described[name] = f"{text}, a multiple of 16" if hinted else text
    return described


def forms(launches: list[Launch]) -> list[str]:
    """For each launch what sets it apart from other launches of its kernel."""
    described = [describe(launch) for launch in launches]
    texts = []
    for launch, own in zip(launches, described, strict=True):
        others = [other for other, one in zip(described, launches, strict=True) if one.name == launch.name]
        texts.append("; ".join(f"{n} {v}" for n, v in own.items() if any(other[n] != v for other in others)))
    return texts
