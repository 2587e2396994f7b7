"""Merges that cannot work: the error names file and tensor, and the output folder stays as it was."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.adapters import edit_adapter, key_of, spiel_config
from support.checkpoints import SHARD, contents, edit_file, saved, trained_adapter
from support.models import tiny_llama
from torch import Tensor

from spiel_peft import merge_adapter_into_checkpoint
from spiel_peft.files.adapter_file import AdapterFile, write_adapter
from spiel_peft.files.tensors import SafetensorsWriter

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture()
def base(tmp_path: Path) -> Path:
    return saved(tiny_llama(), tmp_path / "base", SHARD)


@pytest.fixture()
def adapter(tmp_path: Path, base: Path) -> Path:
    return trained_adapter(base, tmp_path / "adapter")


def refused(base: Path, adapter: Path, message: str, error: type[Exception] = ValueError, **options: object) -> None:
    """The merge fails with this message and writes nothing, whether the output folder exists or not."""
    out = adapter.parent / "out"
    with pytest.raises(error, match=message):
        merge_adapter_into_checkpoint(base, adapter, out, **options)
    assert not out.exists() and not list(out.parent.glob(".out*"))
    out.mkdir()
    (out / "mine").write_text("keep")
    with pytest.raises(error, match=message):
        merge_adapter_into_checkpoint(base, adapter, out, overwrite=True, **options)
    assert contents(out) == {"mine": b"keep"} and not list(out.parent.glob(".out*"))
    (out / "mine").unlink()
    out.rmdir()


def test_an_adapter_for_another_base(tmp_path: Path, adapter: Path) -> None:
    deeper = saved(tiny_llama(num_hidden_layers=3), tmp_path / "deeper")
    for_deeper = trained_adapter(deeper, tmp_path / "for_deeper")
    refused(tmp_path / "base", for_deeper, "for_deeper: delta of 'model.layers.2.*has no place in .*base")
    wider = saved(tiny_llama(intermediate_size=32), tmp_path / "wider")
    refused(
        wider, adapter, r"adapter: delta of '.*down_proj' has 80 values, .* of shape \(16, 32\), .*for another base"
    )
    counted = trained_adapter(wider, tmp_path / "counted", num_deltas={DOWN: 300})
    refused(tmp_path / "base", counted, rf"delta of '{DOWN}': index \d+ is outside of the weight of shape \(16, 24\)")
    tokens = trained_adapter(wider, tmp_path / "tokens", trainable_token_indices=[39])
    smaller = saved(tiny_llama(intermediate_size=32), tmp_path / "smaller")
    edit_file(smaller / "model.safetensors", lambda t: t.update({k: v[:30] for k, v in t.items() if "embed" in k}))
    refused(smaller, tokens, r"rows \[39\] of width 16 do not fit the weight of shape \(30, 16\)")
    extra = AdapterFile(spiel_config(), {}, {"absent.weight": torch.zeros(3)})
    write_adapter(extra, tmp_path / "extra")
    refused(tmp_path / "base", tmp_path / "extra", "tensor 'absent.weight' has no place in")


def test_other_methods_and_damaged_adapters(tmp_path: Path, base: Path, adapter: Path) -> None:
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    refused(base, tmp_path / "lora", "lora is not a SpIEL adapter: its peft_type is 'LORA'")
    refused(base, tmp_path / "nowhere", "adapter_config.json is missing", FileNotFoundError)
    edit_adapter(adapter, lambda tensors: tensors.update({key_of(DOWN, "values"): torch.zeros(3)}))
    refused(base, adapter, f"adapter_model.safetensors: tensor '{DOWN}.spiel_delta.values' must have shape")


def test_missing_and_damaged_base_files(tmp_path: Path, base: Path, adapter: Path) -> None:
    refused(tmp_path / "nowhere", adapter, "base_dir: .*nowhere is not a folder", FileNotFoundError)
    refused(adapter, adapter, "holds an adapter, not a model's weights", FileNotFoundError)
    shard = sorted(base.glob("model-00004-*"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    refused(base, adapter, f"{shard.name} cannot be read, it is damaged or incomplete")
    shard.unlink()
    refused(base, adapter, f"{shard.name} is missing", FileNotFoundError)
    shard.write_bytes(whole)
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config[:-20])
    refused(base, adapter, "config.json cannot be read")
    (base / "config.json").write_text(config.replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1))
    refused(base, adapter, "quantized with 'gptq' .*Give the original full-precision checkpoint")


def test_a_tensor_that_the_files_lack(tmp_path: Path, base: Path, adapter: Path) -> None:
    index = base / "model.safetensors.index.json"
    weights = json.loads(index.read_text())
    file = weights["weight_map"].pop(f"{DOWN}.weight")
    index.write_text(json.dumps(weights))
    edit_file(base / file, lambda tensors: tensors.pop(f"{DOWN}.weight"))
    refused(base, adapter, rf"delta of '{DOWN}' has no place in .*base: no file of it holds {DOWN}.weight")


def test_results_that_are_not_finite(base: Path, adapter: Path) -> None:
    edit_adapter(adapter, lambda tensors: tensors[key_of(DOWN, "values")][:2].fill_(1e30))
    refused(
        base, adapter, rf"{DOWN}.*merged into {DOWN}.weight as torch.float16, 2 weights are not finite", dtype="float16"
    )


def test_options_are_checked(tmp_path: Path, base: Path, adapter: Path) -> None:
    refused(base, adapter, "dtype must be one of float32, .* got 'int8'", dtype="int8")
    refused(base, adapter, "quantization_config must be a transformers.BitsAndBytesConfig", quantization_config={})
    for out in (base, adapter, tmp_path):
        before = contents(tmp_path)
        with pytest.raises(ValueError, match="out_dir: .* would replace"):
            merge_adapter_into_checkpoint(base, adapter, out, overwrite=True)
        assert contents(tmp_path) == before
    with pytest.raises(FileExistsError, match="base exists already"):
        merge_adapter_into_checkpoint(base, adapter, base)


FULL: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "weights": lambda patch: patch.setattr(SafetensorsWriter, "write_bytes", full_after(SafetensorsWriter.write_bytes)),
    "other files": lambda patch: patch.setattr("shutil.copyfile", full_after(lambda *args: None, 0)),
}


def full_after(write: Callable[..., object], allowed: int = 7) -> Callable[..., object]:
    """A function that fails as on a full disk after some calls, then starts to count again."""
    calls = [0]

    def write_until_full(*args: object) -> object:
        calls[0] += 1
        if calls[0] > allowed:
            calls[0] = 0
            raise OSError(errno.ENOSPC, "No space left on device", "file")
        return write(*args)

    return write_until_full


@pytest.mark.parametrize("where", FULL)
def test_a_full_disk(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    FULL[where](monkeypatch)
    refused(base, adapter, "No space left on device", OSError)


def test_weights_of_integers(base: Path, adapter: Path) -> None:
    def quantize(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].to(torch.int8)

    file = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][f"{DOWN}.weight"]
    edit_file(base / file, quantize)
    refused(base, adapter, f"{DOWN}.weight in .*{file} has dtype torch.int8: give the unquantized weights")
