"""The kernels compile for parts that are not there, and their machine code is what it is meant to be.

A sample at the sizes of LLaMA-2-7B; ``python -m benchmarks compiled`` does all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import pkgutil
from pathlib import Path

import pytest
import torch
from triton.runtime.jit import JITFunction

from spiel_kernels import triton_backend
from spiel_kernels.matrix_kind import MatrixKind
from spiel_kernels.outer_plan import plan_outer
from spiel_kernels.triton_backend import every_launch, outer

from .compiler import compiled, launches, machine_code

WIDE = [(11008, 4096)]


def half_launches(part: int) -> list[launches.Launch]:
    return compiled.launches_of(part, WIDE, [torch.bfloat16], ["plain", "nf4 nested", "int8"])


def named(found: list[launches.Launch], name: str) -> list[launches.Launch]:
    return [launch for launch in found if launch.name == name]


@pytest.mark.parametrize("part", compiled.PARTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_machine_code_has_no_faults(dtype: torch.dtype, part: int) -> None:
    single = dtype == torch.float32
    found = compiled.launches_of(part, WIDE, [dtype], ["plain"]) if single else half_launches(part)
    if single:  # what the width of the operands changes
        found = [launch for launch in found if launch.name in ("tile_products_kernel", "entry_dots_kernel")]
    assert len(found) >= 4
    for launch in found:
        kernel = machine_code.compile_launch(launch, part)
        code = machine_code.read_machine_code(kernel, part)
        assert not machine_code.faults(launch, kernel, code, part), (launch.name, machine_code.describe(launch))


def test_every_kernel_is_launched() -> None:
    kernels = set()
    for module in pkgutil.iter_modules(triton_backend.__path__, triton_backend.__name__ + "."):
        functions = vars(importlib.import_module(module.name)).values()
        kernels |= {one.__name__ for one in functions if isinstance(one, JITFunction)}
    launched = {launch.name for launch in half_launches(90)}
    assert {name for name in kernels if name.endswith("_kernel")} == launched
    assert len(launched) > 8


def test_arguments_get_the_hints_of_the_jit() -> None:
    (launch,) = {one.key: one for one in named(half_launches(90), "token_major_kernel")}.values()
    described = machine_code.describe(launch)
    assert described["x"] == "bf16" and described["tokens"] == "i32"
    assert described["padded"] == "i32, a multiple of 16"
    assert described["stride_width"] == "1" and launch.signature["stride_width"] == "constexpr"
    assert launch.hints[(0,)] == [["tt.divisibility", 16]]
    assert launch.options["num_warps"] == 4


def test_faults_are_found() -> None:
    tile = named(half_launches(80), "tile_products_kernel")[0]
    kernel = machine_code.compile_launch(tile, 80)
    code = machine_code.read_machine_code(kernel, 80, count_instructions=True)
    assert code.matrix > 8 and code.instructions > 300
    too_much = dataclasses.replace(code, stack_bytes=8, shared_bytes=164 << 10, matrix=0)
    reasons = machine_code.faults(tile, kernel, too_much, 80)
    assert [reason.split(" on ")[0] for reason in reasons] == [
        "8 bytes of registers spilled per thread",
        f"{164 << 10} bytes of shared memory, of {163 << 10}",
        "no mma.sync",
    ]


def test_spills_are_seen() -> None:
    tile = named(half_launches(80), "tile_products_kernel")[0]
    tile.options["maxnreg"] = 32
    assert machine_code.read_machine_code(machine_code.compile_launch(tile, 80), 80).stack_bytes > 100


@pytest.mark.parametrize("name", ["_fold_4bit_kernel", "_fold_8bit_kernel"])
def test_a_missing_barrier_is_found(name: str) -> None:
    launch = next(one for one in named(half_launches(90), name) if machine_code.describe(one)["FOLD"] == "True")
    ptx = machine_code.compile_launch(launch, 90).asm["ptx"]
    source = inspect.getsourcelines(launch.kernel.fn)
    assert machine_code.barriers_hold(ptx, *source)
    lines = ptx.splitlines()
    barriers = [number for number, line in enumerate(lines) if "bar.sync" in line]
    without = [line for number, line in enumerate(lines) if number not in barriers]
    assert not machine_code.barriers_hold("\n".join(without), *source)
    last_store = max(number for number, line in enumerate(without) if "st.global" in line)
    late = [*without[: last_store + 1], lines[barriers[0]], *without[last_store + 1 :]]
    assert not machine_code.barriers_hold("\n".join(late), *source)


def test_a_missing_barrier_at_the_end_of_a_loop_is_found() -> None:
    launch = named(half_launches(90), "dense_entries_kernel")[0]
    lines = machine_code.compile_launch(launch, 90).asm["ptx"].splitlines()
    source = inspect.getsourcelines(launch.kernel.fn)
    assert machine_code.barriers_hold("\n".join(lines), *source)
    last_store = max(number for number, line in enumerate(lines) if "st.global" in line)
    open_end = [line for number, line in enumerate(lines) if number < last_store or "bar.sync" not in line]
    assert not machine_code.barriers_hold("\n".join(open_end), *source)


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = named(half_launches(80), "_count_kernel")
    monkeypatch.setattr(compiled, "launches_of", lambda part: few)
    compiled.run(argparse.Namespace(parts=[80], output=tmp_path))
    result = json.loads((tmp_path / "compiled_kernels.json").read_text())
    assert result["faults"] == [] and result["versions"]["triton"]
    (kernel,) = result["kernels"]
    code = dict(zip(result["columns"], kernel["sm_80"], strict=True))
    assert 0 < code["registers"] < 255 and code["instructions"] > 50 and code["matrix"] == 0
    assert "| `_count_kernel` | 4 |  | 1 | " in capsys.readouterr().out
    monkeypatch.setattr(machine_code, "faults", lambda *_: ["it leaks"])
    with pytest.raises(SystemExit, match="_count_kernel .*: it leaks"):
        compiled.run(argparse.Namespace(parts=[80], output=tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="unset it"):
        compiled.run(argparse.Namespace(parts=[80], output=tmp_path))


def test_counts_have_no_compilations_of_their_own() -> None:
    """A number that is 1 or a multiple of 16 would get one, if its argument were specialized on."""
    for dtype in (torch.bfloat16, torch.float32):
        keys = []
        for k in (1, 16, 170, 6000):
            with launches.recorded(90) as found:
                for stored in ("plain", "nf4 nested", "int8"):
                    every_launch.launch_all(MatrixKind(192, 320, dtype, stored, k=k))
            keys.append({(launch.name, launch.key) for launch in found})
        assert all(one == keys[0] for one in keys[1:])


def test_the_number_of_tokens_has_no_compilation_of_its_own() -> None:
    indices = torch.arange(0, 192 * 320, 7, dtype=torch.int32)
    keys = []
    for tokens in (2, 16, 33, 64, 1024, 6000):
        a, b = torch.empty(tokens, 192), torch.empty(tokens, 320)
        with launches.recorded(90) as found:
            for method in ("compact", "entries"):
                outer.gather_outer(a, b, indices, plan_outer(indices, 192, 320, tokens, a.dtype, method))
        keys.append({(launch.name, launch.key) for launch in found})
    assert all(one == keys[0] for one in keys[1:])
