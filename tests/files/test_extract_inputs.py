"""Checkpoints that do not fit together or cannot be read: the error names file and tensor, nothing is written."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import SHARD, changed, contents, edit_file, saved
from support.models import tiny_llama
from torch import Tensor

from spiel_peft import extract_delta
from spiel_peft.files.tensors import SafetensorsWriter

QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture()
def base(tmp_path: Path) -> Path:
    return saved(tiny_llama(), tmp_path / "base")


def refused(tmp_path: Path, base: Path, message: str, error: type[Exception] = ValueError, **wanted: object) -> None:
    for out in (None, tmp_path / "out"):
        with pytest.raises(error, match=message):
            extract_delta(base, tmp_path / "tuned", out, **{"density": 0.1, **wanted})
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


EDITS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(QUERY), rf"tuned has no tensor for {QUERY}; .*exclude_modules="),
    "shape": (
        lambda t: t.update({"lm_head.weight": torch.randn(44, 16)}),
        r"lm_head.weight has shape \(40, 16\) in .*base.* but \(44, 16\) in .*tuned.*resize_token_embeddings",
    ),
    "integer": (lambda t: t.update({QUERY: t[QUERY].to(torch.int8)}), rf"{QUERY} in .*tuned.*int8.*unquantized"),
    "nan": (lambda t: t[QUERY].view(-1)[3:4].fill_(float("nan")), "q_proj.weight: the change .* is not finite"),
}


@pytest.mark.parametrize("case", EDITS)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, base: Path, case: str) -> None:
    edit, message = EDITS[case]
    edit_file(saved(changed(tiny_llama()), tmp_path / "tuned") / "model.safetensors", edit)
    refused(tmp_path, base, message)
    if case != "nan":
        found = extract_delta(
            base, tmp_path / "tuned", density=0.1, exclude_modules=["lm_head", "model.layers.0.self_attn.q_proj"]
        )
        assert "lm_head" not in found.counts and len(found.counts) == 14


def test_missing_and_damaged_files_are_named(tmp_path: Path, base: Path) -> None:
    refused(tmp_path, base, "finetuned: .*tuned does not exist", FileNotFoundError)
    tuned = saved(changed(tiny_llama()), tmp_path / "tuned", SHARD)
    shard = tuned / "model-00003-of-00005.safetensors"
    if not shard.exists():
        shard = sorted(tuned.glob("model-00003-*"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    refused(tmp_path, base, f"{shard.name} cannot be read")
    shard.unlink()
    refused(tmp_path, base, f"{shard.name} is missing", FileNotFoundError)
    shard.write_bytes(whole)
    edit_file(shard, lambda tensors: tensors.popitem())
    refused(tmp_path, base, f"{shard.name} lacks the tensor")
    (tuned / "model.safetensors.index.json").write_text("{")
    refused(tmp_path, base, "index.json cannot be read")
    (tuned / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    refused(tmp_path, base, "not a file of this folder")
    for path in tuned.iterdir():
        path.unlink()
    refused(tmp_path, base, "model.safetensors is missing, and so is an index", FileNotFoundError)


def test_quantized_checkpoints_are_refused(tmp_path: Path, base: Path) -> None:
    tuned = saved(tiny_llama(), tmp_path / "tuned")
    config = json.loads((tuned / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tuned / "config.json").write_text(json.dumps(config))
    refused(tmp_path, base, "tuned holds weights quantized with 'bitsandbytes'")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"num_deltas": 5}, "exactly one of density, num_deltas and r"),
        ({"density": None}, "exactly one of density, num_deltas and r"),
        ({"density": 1.5}, "density"),
        ({"scope": "layer"}, "scope must be 'module' or 'global'"),
        ({"density": None, "num_deltas": {"absent": 3}}, "absent"),
    ],
)
def test_budgets_are_checked_first(tmp_path: Path, base: Path, wanted: dict[str, object], message: str) -> None:
    saved(changed(tiny_llama()), tmp_path / "tuned")
    refused(tmp_path, base, message, **wanted)


def test_equal_checkpoints_have_no_adapter(tmp_path: Path, base: Path) -> None:
    saved(tiny_llama(), tmp_path / "tuned")
    refused(tmp_path, base, "do not differ")


def test_what_is_there_is_kept_unless_it_may_be_replaced(tmp_path: Path, base: Path) -> None:
    tuned = saved(changed(tiny_llama()), tmp_path / "tuned")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match="out exists already"):
        extract_delta(base, tuned, tmp_path / "out", density=0.1)
    assert contents(tmp_path / "out") == {"mine": b"keep"}
    extract_delta(base, tuned, tmp_path / "out", density=0.1, overwrite=True)
    assert set(contents(tmp_path / "out")) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = saved(changed(tiny_llama()), tmp_path / "tuned")
    extract_delta(base, tuned, tmp_path / "out", density=0.1)
    before = contents(tmp_path / "out")

    def full(self: SafetensorsWriter, name: str, start: int, data: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path))

    monkeypatch.setattr(SafetensorsWriter, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device.*adapter_model.safetensors"):
        extract_delta(base, tuned, tmp_path / "out", density=0.2, overwrite=True)
    assert contents(tmp_path / "out") == before and not list(tmp_path.glob(".*"))
