"""Deltas lost in rounding are counted exactly, and reported only where the loss is notable."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from support.adapters import adapted, deltas_of, layers_of
from support.models import tiny_llama
from torch import Tensor

from spiel_peft import merge_adapter_into_checkpoint
from spiel_peft.files.adapter_file import AdapterFile, StoredDelta, config_of_deltas, write_adapter
from spiel_peft.weights.merge_report import count_lost

# Share of deltas of some standard deviation that are lost in bfloat16 weights of standard deviation 0.03.
MEASURED = {1e-5: 0.92, 1e-4: 0.44, 1e-3: 0.055, 1e-2: 0.004}


def weight() -> Tensor:
    return (torch.randn(512, 512) * 0.03).bfloat16()


def single_matrix(folder: Path, size: float) -> tuple[Path, Path]:
    base = folder / "base"
    base.mkdir()
    save_file({"layer.weight": weight()}, base / "model.safetensors")
    deltas = {"layer": StoredDelta(torch.arange(512 * 512, dtype=torch.int32), torch.randn(512 * 512) * size)}
    write_adapter(AdapterFile(config_of_deltas(deltas), deltas), folder / "adapter")
    return base, folder / "adapter"


@pytest.mark.parametrize("size", MEASURED)
def test_a_merge_into_files_counts_what_is_lost(tmp_path: Path, size: float, caplog: pytest.LogCaptureFixture) -> None:
    base, adapter = single_matrix(tmp_path, size)
    with caplog.at_level(logging.INFO, logger="spiel_peft"):
        report = merge_adapter_into_checkpoint(base, adapter, tmp_path / "out")
    assert report.loss.share == pytest.approx(MEASURED[size], rel=0.1, abs=0.0015)
    # A few deltas are too small even for the float32 sum.
    assert 0.999 < report.loss.total / 512**2 <= 1 and report.modules["layer"].lost == report.loss.lost
    (record,) = caplog.records
    assert f"Rounding to bfloat16 lost {report.loss.lost} of {report.loss.total}" in record.message
    notable = report.loss.share > 0.01
    assert (record.levelno == logging.WARNING) == notable == ("float32" in record.message)
    exact = merge_adapter_into_checkpoint(base, adapter, tmp_path / "exact", dtype="float32")
    assert exact.loss.lost < 1e-4 * exact.loss.total and exact.dtypes == {"float32"}


def test_rounding_the_base_itself_is_not_counted(tmp_path: Path) -> None:
    """Storing a float32 base in bfloat16 changes every weight; large deltas are not lost."""
    base = tmp_path / "base"
    base.mkdir()
    save_file({"layer.weight": torch.randn(64, 64) * 0.03}, base / "model.safetensors")
    deltas = {"layer": StoredDelta(torch.arange(0, 4096, 2, dtype=torch.int32), torch.full((2048,), 0.1))}
    write_adapter(AdapterFile(config_of_deltas(deltas), deltas), tmp_path / "adapter")
    report = merge_adapter_into_checkpoint(base, tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    assert (report.loss.total, report.loss.lost) == (2048, 0)


def test_zero_deltas_are_not_counted() -> None:
    original = torch.tensor([1.0, 1.0, 1.0, 1.0])
    wanted = torch.tensor([1.0, 1.004, 1.0001, 0.9])
    loss = count_lost(original, wanted, wanted.bfloat16())
    assert (loss.total, loss.lost, loss.share) == (3, 1, 1 / 3)


def model_with_deltas(size: float, dtype: torch.dtype) -> PeftModel:
    model = adapted(tiny_llama(dtype=dtype, hidden_size=32), target_modules="all-linear", r=8)
    for delta in deltas_of(model).values():
        delta.values.data.normal_(std=size)
    return model


@pytest.mark.parametrize("unload", [False, True], ids=["merge", "merge and unload"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_merge_in_memory_says_so_in_the_log_only(
    dtype: torch.dtype, unload: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_with_deltas(1e-5, dtype)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, logger="spiel_peft"):
        warnings.simplefilter("error")
        model.merge_and_unload() if unload else model.merge_adapter()
    (record,) = caplog.records
    name = str(dtype).removeprefix("torch.")
    assert record.message.startswith(f"Rounding to {name} lost") and "Load the base in float32" in record.message
    if not unload:
        lost = sum(layer.merging.loss.lost for layer in layers_of(model))
        total = sum(layer.merging.loss.total for layer in layers_of(model))
        assert total > 0.99 * sum(delta.k for delta in deltas_of(model).values())
        assert f"lost {lost} of {total}" in record.message and lost > 0.5 * total * (dtype == torch.bfloat16)


@pytest.mark.parametrize(("size", "dtype"), [(0.5, torch.bfloat16), (1e-5, torch.float32)])
def test_a_merge_that_loses_next_to_nothing_is_quiet(
    size: float, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="spiel_peft"):
        model_with_deltas(size, dtype).merge_adapter()
    assert not caplog.records
