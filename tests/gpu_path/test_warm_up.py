"""Kernels that are compiled ahead are those that a run launches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from peft import get_peft_model
from support.quantized import COLS, ROWS, linear_4bit, linear_8bit
from torch import nn
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import spiel_kernels
from spiel_kernels import MatrixKind, triton_backend
from spiel_kernels.triton_backend import compile_ahead, every_launch, outer_kernels
from spiel_peft import SpIELConfig, warm_up
from spiel_peft.layers.kinds import matrix_kind

from .compiler import launches

DEVICE = "warmed up"


class Driver(launches._Driver):
    def get_current_device(self) -> str:
        return DEVICE


@pytest.fixture
def part() -> Iterator[None]:
    """Triton takes the device for a GPU of the kind sm_90; what is compiled for it stays apart from other tests."""
    before = driver._active
    driver.set_active(Driver(launches.gpu_target(90)))
    yield
    driver._active = before


def test_a_run_finds_its_kernels_compiled(part: None) -> None:
    kinds = [MatrixKind(192, 1600, torch.bfloat16, stored) for stored in ("plain", "nf4 nested", "int8")]
    launch = JITFunction.run
    ready = compile_ahead.compile_ahead([*kinds, kinds[0]])
    assert JITFunction.run is launch
    with launches.recorded(90) as found:
        for kind in kinds:
            every_launch.launch_all(MatrixKind(448, 1536, kind.dtype, kind.stored, k=4321))
    wanted = {(launch.kernel, launch.key) for launch in found}
    assert ready == len(wanted) > 15
    assert not [(kernel, key) for kernel, key in wanted if key not in kernel.device_caches[DEVICE][0]]
    assert compile_ahead.compile_ahead(kinds) == ready


def test_an_error_leaves_launches_as_they_were(part: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = JITFunction.run
    monkeypatch.setattr(compile_ahead, "launch_all", lambda kind: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compile_ahead.compile_ahead([MatrixKind(64, 64, torch.float32)])
    assert JITFunction.run is launch


def test_nothing_is_compiled_for_a_cpu() -> None:
    kind = MatrixKind(64, 64, torch.float32)
    before = outer_kernels.entry_dots_kernel.device_caches.copy()
    assert spiel_kernels.warm_up([kind], "cpu") == 0
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), SpIELConfig(target_modules=["0"]))
    assert warm_up(model) == 0
    assert outer_kernels.entry_dots_kernel.device_caches == before and triton_backend


def test_the_kinds_of_a_models_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {
        "plain": nn.Linear(24, 40),
        "bf16": nn.Linear(24, 40, dtype=torch.bfloat16),
        "nf4": linear_4bit("nf4", double=True, compute=torch.bfloat16),
        "fp4": linear_4bit("fp4", double=False, compute=torch.float16),
        "int8": linear_8bit(),
        "fp64": nn.Linear(24, 40, dtype=torch.float64),
        "conv": nn.Conv1d(4, 4, 3),
    }
    config = SpIELConfig(target_modules=list(layers), r=2)
    model = get_peft_model(nn.ModuleDict(layers), config, autocast_adapter_dtype=True)
    seen = {}
    monkeypatch.setattr(spiel_kernels, "warm_up", lambda kinds, device: seen.setdefault(device, kinds) and 7)
    assert warm_up(model) == 7
    single, half = torch.float32, torch.bfloat16
    assert seen[torch.device("cpu")] == [
        MatrixKind(40, 24, single, weight_dtype=single),
        MatrixKind(40, 24, half, weight_dtype=half),
        MatrixKind(ROWS, COLS, half, "nf4 nested", weight_dtype=single),
        MatrixKind(ROWS, COLS, torch.float16, "fp4", weight_dtype=single),
        MatrixKind(ROWS, COLS, torch.float16, "int8"),
    ]
    plain = model.base_model.model["plain"]
    kind = matrix_kind(plain, plain.spiel_delta["default"], half)
    assert kind == MatrixKind(40, 24, half, weight_dtype=single)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((4, 4, torch.float32, "nf5"), "stored must be one of plain, nf4, .*, got 'nf5'"),
        ((4, 4, torch.float64), "dtype and weight_dtype must be .*, got torch.float64 and torch.float64"),
        ((0, 4, torch.float32), "rows, cols and k must be at least 1, got 0, 4 and 1024"),
    ],
)
def test_a_kind_that_does_not_exist_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatrixKind(*arguments)
