"""Compile every Triton kernel for GPUs that are not there, at the sizes of LLaMA-2-7B: registers, spills, instructions.

Needs no GPU: the compiler and the assembler come with Triton. Ends with status 1 if a kernel spills registers, asks for
more shared memory than the part has, lacks a barrier between writing elements and overwriting some of them, multiplies
matrices of 16-bit numbers without the part's matrix instructions, or divides 32-bit positions in 64 bits.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..environment import add_output_argument, save
from ..tables import markdown

if TYPE_CHECKING:
    from .launches import Launch

RESULT = "compiled_kernels"
PARTS = (80, 90, 100)
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STORED = ("plain", "nf4", "nf4 nested", "int8")
RANK = 64
_CODE = ("registers", "stack_bytes", "shared_bytes", "matrix", "barriers", "instructions")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", type=int, choices=PARTS, default=list(PARTS), help="all by default")
    add_output_argument(parser)


def launches_of(
    part: int,
    shapes: Iterable[tuple[int, int]] = SHAPES,
    dtypes: Iterable[torch.dtype] = DTYPES,
    stored: Iterable[str] = STORED,
) -> list[Launch]:
    """What training matrices of these shapes, dtypes and formats launches on a part, one of each compilation."""
    from spiel_kernels.matrix_kind import MatrixKind
    from spiel_kernels.triton_backend import every_launch as every

    from .launches import recorded
    from .machine_code import distinct

    dtypes, stored = tuple(dtypes), tuple(stored)
    with recorded(part) as launches:
        for rows, cols in shapes:
            for dtype in dtypes:
                kinds = [MatrixKind(rows, cols, dtype, form, k=RANK * (rows + cols)) for form in stored]
                every.launch_all(kinds[0])
                for kind in kinds[1:]:
                    every.launch_folds(kind)
                if dtype == torch.float32:
                    _with_tf32(lambda kind=kinds[0]: every.launch_gathers(kind))
    return distinct(launches)


def _with_tf32(run: Callable[[], None]) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        run()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def measure(part: int, launches: list[Launch]) -> list[dict[str, Any]]:
    """Compile launches for a part and describe the machine code of each."""
    from .machine_code import compile_launch, faults, forms, read_machine_code

    entries = []
    for launch, form in zip(launches, forms(launches), strict=True):
        kernel = compile_launch(launch, part)
        code = read_machine_code(kernel, part, count_instructions=True)
        warps, stages = launch.options["num_warps"], launch.options["num_stages"]
        entry = {"kernel": launch.name, "form": form, "warps": warps, "stages": stages}
        entries.append({**entry, "code": code.to_json(), "faults": faults(launch, kernel, code, part)})
    return entries


def run(args: argparse.Namespace) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set, with which Triton compiles nothing; unset it")
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    wrong = []
    for part in args.parts:
        entries = measure(part, launches_of(part))
        print(f"== sm_{part}: {len(entries)} compilations", flush=True)
        for entry in entries:
            common = {name: entry[name] for name in ("kernel", "form", "warps", "stages")}
            row = rows.setdefault((entry["kernel"], entry["form"]), common)
            row[f"sm_{part}"] = [entry["code"][name] for name in _CODE]
            wrong += [f"{entry['kernel']} ({entry['form']}): {fault}" for fault in entry["faults"]]
    settings = {
        "shapes": [list(shape) for shape in SHAPES],
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in DTYPES],
        "stored": list(STORED),
        "r": RANK,
    }
    result = {"settings": settings, "parts": args.parts, "columns": _CODE, "kernels": list(rows.values())}
    print(save(RESULT, {**result, "faults": wrong}, args.output, "cpu"))
    print(compiled_table(result))
    if wrong:
        raise SystemExit("\n".join(wrong))


def compiled_table(result: dict[str, Any]) -> str:
    """A row per kernel, number of warps and use of matrix units: the largest numbers of all compilations of it."""
    parts = [f"sm_{part}" for part in result["parts"]]
    groups: dict[tuple[str, int, bool], list[dict[str, dict[str, int]]]] = {}
    for row in result["kernels"]:
        codes = {part: dict(zip(result["columns"], row[part], strict=True)) for part in parts if part in row}
        matrix = any(code["matrix"] for code in codes.values())
        groups.setdefault((row["kernel"], row["warps"], matrix), []).append(codes)
    rows = []
    for (kernel, warps, matrix), group in sorted(groups.items()):
        cells = [_largest([codes[part] for codes in group if part in codes]) for part in parts]
        rows.append([f"`{kernel}`", str(warps), "yes" if matrix else "", str(len(group)), *cells])
    return markdown(["kernel", "warps", "matrix units", "compilations", *parts], rows)


def _largest(codes: list[dict[str, int]]) -> str:
    if not codes:
        return ""
    most = {name: max(code[name] for code in codes) for name in codes[0]}
    return f"{most['registers']}, {most['stack_bytes']}, {most['shared_bytes'] / 1024:.3g}, {most['instructions']}"
