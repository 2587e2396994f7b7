"""Adapter folders read and written as plain tensors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapters import FILE, spiel_config
from support.models import IDS, tiny_llama

from spiel_peft.files.adapter_file import AdapterFile, StoredDelta, config_of_deltas, read_adapter, write_adapter
from spiel_peft.files.folder import whole_folder


@pytest.fixture()
def saved(tmp_path: Path) -> Path:
    model = get_peft_model(tiny_llama(), spiel_config(modules_to_save=["lm_head"], rank_pattern={"down_proj": 3}))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_what_is_read_is_what_the_model_holds(saved: Path) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), saved)
    adapter = read_adapter(saved)
    assert set(adapter.deltas) == {
        f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    for name, stored in adapter.deltas.items():
        delta = model.base_model.model.get_submodule(name).spiel_delta["default"]
        assert torch.equal(stored.indices, delta.indices) and torch.equal(stored.values, delta.values)
    assert set(adapter.others) == {"lm_head.weight"}


def test_written_with_its_counts_in_the_config_it_loads_to_the_same_outputs(saved: Path, tmp_path: Path) -> None:
    adapter = read_adapter(saved)
    config = config_of_deltas(adapter.deltas, adapter.config)
    assert config.r is None and config.rank_pattern == {} and config.modules_to_save == ["lm_head"]
    write_adapter(AdapterFile(config, adapter.deltas, adapter.others), tmp_path / "copy")
    with torch.no_grad():
        first, second = (
            PeftModel.from_pretrained(tiny_llama(), path)(IDS).logits for path in (saved, tmp_path / "copy")
        )
    assert torch.equal(first, second)


def test_other_methods_and_missing_or_damaged_files_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        read_adapter(tmp_path)
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="not a SpIEL adapter: its peft_type is .LORA."):
        read_adapter(tmp_path / "lora")
    tensors = load_file(saved / FILE)
    key = next(key for key in tensors if key.endswith("indices"))
    save_file({**tensors, key: tensors[key].flip(0)}, saved / FILE)
    with pytest.raises(
        ValueError, match=rf"adapter_model.safetensors: tensor '{key.removeprefix('base_model.model.')}'"
    ):
        read_adapter(saved)
    (saved / FILE).write_bytes((saved / FILE).read_bytes()[:-5])
    with pytest.raises(ValueError, match="adapter_model.safetensors cannot be read"):
        read_adapter(saved)
    (saved / FILE).unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is missing"):
        read_adapter(saved)


def test_a_damaged_delta_is_not_written(saved: Path, tmp_path: Path) -> None:
    adapter = read_adapter(saved)
    name = next(iter(adapter.deltas))
    adapter.deltas[name] = StoredDelta(adapter.deltas[name].indices.flip(0), adapter.deltas[name].values)
    with pytest.raises(ValueError, match=name):
        write_adapter(adapter, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with pytest.raises(OSError, match="disk full"), whole_folder(target) as work:
        (work / "a").write_text("half")
        raise OSError("disk full")
    assert list(target.parent.iterdir()) == []
    with whole_folder(target) as work:
        (work / "a").write_text("first")
        assert not target.exists()
    assert (target / "a").read_text() == "first" and os.access(target, os.R_OK | os.X_OK)
    with pytest.raises(FileExistsError, match="exists already"), whole_folder(target):
        raise AssertionError("must not be entered")
    with pytest.raises(OSError, match="disk full"), whole_folder(target, overwrite=True) as work:
        raise OSError("disk full")
    assert (target / "a").read_text() == "first"
    with whole_folder(target, overwrite=True) as work:
        (work / "b").write_text("second")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in target.parent.iterdir()] == ["target"]
