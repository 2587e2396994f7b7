"""Converted adapters of the published SpIEL code, SHiRA and Super-Tuning compute the same as the originals."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapters import FILE, PREFIX
from support.models import logits, tiny_llama
from torch import Tensor, nn

from spiel_peft.convert import convert_adapter, detect_kind, export_dense_diff, export_shira, export_sparse_patch
from spiel_peft.files.adapter_file import read_adapter

from .helpers import DOWN, Q, loaded

TARGETS = ["q_proj", "down_proj"]


def save_source(folder: Path, config: Any) -> Tensor:
    """Save an adapter of PEFT on a tiny Llama; returns its outputs after loading it again."""
    torch.manual_seed(5)
    get_peft_model(tiny_llama(), config).save_pretrained(folder)
    return loaded(tiny_llama(), folder)


def shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tiny_llama().named_parameters()}


def write_fork(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    settings = {
        "peft_type": "SFT",
        "base_model_name_or_path": "some/base",
        "task_type": "CAUSAL_LM",
        "density": 0.01,
        "target_modules": TARGETS,
        "dtype": "float32",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}, folder / FILE)
    return folder


def fork_tensors(order: str = "as moved", name: str = "") -> tuple[dict[str, Tensor], nn.Module]:
    """Tensors of the fork's format, and a model with their deltas scattered into its weights."""
    model, tensors = tiny_llama(), {}
    generator = torch.Generator().manual_seed(2)
    for module in (Q, DOWN):
        weight = model.get_submodule(module).weight
        indices = torch.randperm(weight.numel(), generator=generator)[:30]
        values = torch.randn(30, generator=generator)
        with torch.no_grad():
            weight.view(-1).index_add_(0, indices, values)
        order_of = indices.argsort() if order == "sorted" else torch.arange(30)
        tensors[f"{module}.sft_delta.{name}indices"] = indices[order_of].to(
            torch.int32 if order == "sorted" else torch.int64
        )
        tensors[f"{module}.sft_delta.{name}values"] = values[order_of]
    return tensors, model


@pytest.mark.parametrize(("order", "name"), [("sorted", ""), ("as moved", ""), ("as moved", "french.")])
def test_adapters_of_the_published_code(tmp_path: Path, order: str, name: str) -> None:
    tensors, model = fork_tensors(order, name)
    head = torch.randn(40, 16)
    with torch.no_grad():
        model.lm_head.weight.copy_(head)
    source = write_fork(
        tmp_path / "fork",
        {**tensors, "lm_head.weight": head},
        modules_to_save=["lm_head"],
        selection_algorithm="sm3",
        reselection_steps=30,
        selection_accumulation_steps=7,
        initial_reselection_rate=0.3,
        dropout=0.1,
    )
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    result = convert_adapter(source, tmp_path / "out", base=base)
    assert result.kind == "SFT" and result.num_deltas == 60 and result.others == ["lm_head.weight"]
    assert any("dropout=0.1" in note for note in result.notes)
    assert torch.equal(loaded(tiny_llama(), tmp_path / "out"), logits(model))
    config = read_adapter(tmp_path / "out").config
    assert (config.growth, config.regrow_every, config.accumulation_steps) == ("momentum", 30, 7)
    assert (config.initial_regrow_rate, config.delta_dtype, config.task_type) == (0.3, "float32", "CAUSAL_LM")
    assert config.base_model_name_or_path == "some/base" and config.num_deltas == {Q: 30, DOWN: 30}


def test_positions_that_repeat_in_the_published_format_add_up(tmp_path: Path) -> None:
    entries = {"indices": torch.tensor([7, 3, 7]), "values": torch.tensor([1.0, 2.0, 0.5])}
    source = write_fork(tmp_path / "fork", {f"{Q}.sft_delta.{name}": tensor for name, tensor in entries.items()})
    convert_adapter(source, tmp_path / "out")
    delta = read_adapter(tmp_path / "out").deltas[Q]
    assert delta.indices.tolist() == [3, 7] and delta.values.tolist() == [2.0, 1.5]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({f"{Q}.sft_delta.values": None}, rf"tensor 'values' of module '{Q}' is missing"),
        ({f"{Q}.sft_delta.indices": torch.zeros(30)}, "positions of dtype torch.float32"),
        ({f"{Q}.sft_delta.indices": torch.arange(29)}, "positions of shape"),
        ({f"{Q}.sft_delta.indices": torch.arange(30) + 256}, "position"),
        ({f"{Q}.sft_delta.indices": torch.arange(30) - 1}, "negative"),
        ({f"{Q}.sft_delta.values": torch.full((30,), float("inf"))}, "not finite"),
        ({f"{Q}.sft_delta.more": torch.zeros(30)}, "not one that this converter"),
        ({"model.norm.weight": torch.zeros(16)}, "'model.norm.weight' belongs to no module of modules_to_save"),
    ],
)
def test_damaged_adapters_are_named(tmp_path: Path, changed: dict[str, Tensor | None], message: str) -> None:
    tensors = {**fork_tensors()[0], **changed}
    source = write_fork(tmp_path / "fork", {key: t for key, t in tensors.items() if t is not None})
    with pytest.raises(ValueError, match=f"{FILE}.*{message}"):
        convert_adapter(source, tmp_path / "out", base=shapes())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fork"]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("was_run",)


def test_pickled_adapters_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_fork(tmp_path / "fork", fork_tensors()[0])
    (source / FILE).unlink()
    torch.save({f"{PREFIX}{Q}.sft_delta.values": Evil()}, source / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.bin cannot be read"):
        convert_adapter(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fork"]
    torch.save({f"{PREFIX}{key}": tensor for key, tensor in fork_tensors()[0].items()}, source / "adapter_model.bin")
    assert convert_adapter(source, tmp_path / "out").num_deltas == 60


def test_shira(tmp_path: Path) -> None:
    config = ShiraConfig(
        r=2,
        target_modules=TARGETS,
        init_weights=False,
        random_seed=4,
        task_type="CAUSAL_LM",
        modules_to_save=["lm_head"],
    )
    expected = save_source(tmp_path / "shira", config)
    result = convert_adapter(tmp_path / "shira", tmp_path / "out", base=shapes())
    assert result.kind == "SHIRA" and result.num_deltas == 2 * 2 * (2 * 16 + 16 + 24)
    assert torch.equal(loaded(tiny_llama(), tmp_path / "out"), expected)
    assert not torch.equal(expected, logits(tiny_llama()))
    assert read_adapter(tmp_path / "out").config.growth == "none"


def test_shira_needs_the_shapes_and_positions_inside_them(tmp_path: Path) -> None:
    save_source(tmp_path / "shira", ShiraConfig(r=1, target_modules=["q_proj"], init_weights=False))
    with pytest.raises(ValueError, match="rows and columns; pass base="):
        convert_adapter(tmp_path / "shira", tmp_path / "out")
    small = {name: (8, 8) if "q_proj" in name else shape for name, shape in shapes().items()}
    with pytest.raises(ValueError, match=rf"{FILE}.*{Q}.shira_indices' leads out of the weight's shape \(8, 8\)"):
        convert_adapter(tmp_path / "shira", tmp_path / "out", base=small)
    tensors = load_file(tmp_path / "shira" / FILE)
    key = f"{PREFIX}{Q}.shira_indices"
    # PEFT on Windows writes floats.
    save_file({**tensors, key: tensors[key].float()}, tmp_path / "shira" / FILE)
    assert convert_adapter(tmp_path / "shira", tmp_path / "out", base=shapes()).num_deltas == 64
    save_file({**tensors, key: tensors[key].float() + 0.5}, tmp_path / "shira" / FILE)
    with pytest.raises(ValueError, match="no integers"):
        convert_adapter(tmp_path / "shira", tmp_path / "new", base=shapes())
    tensors.pop(key)
    save_file(tensors, tmp_path / "shira" / FILE)
    with pytest.raises(ValueError, match="'indices' of module .* is missing"):
        convert_adapter(tmp_path / "shira", tmp_path / "new", base=shapes())


@pytest.mark.filterwarnings("ignore:save_precomputed_indices=False")
@pytest.mark.parametrize("select_top", [True, False])
@pytest.mark.parametrize("with_indices", [True, False])
def test_super_tuning(tmp_path: Path, with_indices: bool, select_top: bool) -> None:
    config = SupertuningConfig(
        sparsity=0.8,
        select_top=select_top,
        target_modules=TARGETS,
        init_weights=False,
        save_precomputed_indices=with_indices,
    )
    expected = save_source(tmp_path / "super", config)
    if not with_indices:
        with pytest.raises(ValueError, match=r"save_precomputed_indices=False; pass base= with the values"):
            convert_adapter(tmp_path / "super", tmp_path / "out", base=shapes())
    base = None if with_indices else tiny_llama()
    result = convert_adapter(tmp_path / "super", tmp_path / "out", base=base)
    assert result.num_deltas == 2 * (int(256 * 0.2) + int(384 * 0.2))
    assert any("magnitude" in note for note in result.notes) != with_indices
    assert torch.equal(loaded(tiny_llama(), tmp_path / "out"), expected)


def test_supra_adapters_are_refused(tmp_path: Path) -> None:
    save_source(tmp_path / "supra", SupertuningConfig(sparsity=0.8, r=2, target_modules=TARGETS))
    with pytest.raises(ValueError, match="r=2 makes it a Supra adapter"):
        convert_adapter(tmp_path / "supra", tmp_path / "out")


def test_the_kind_is_found_out_or_refused_by_name(tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="'LORA' are not sparse"):
        detect_kind(tmp_path / "lora")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        detect_kind(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        detect_kind(tmp_path)
    source = write_fork(tmp_path / "fork", fork_tensors()[0])
    convert_adapter(source, tmp_path / "out", kind="sft")
    with pytest.raises(ValueError, match="is a SpIEL adapter already"):
        detect_kind(tmp_path / "out")
    with pytest.raises(ValueError, match="peft_type is 'SFT', not 'SHIRA'"):
        convert_adapter(source, tmp_path / "new", base=shapes(), kind="shira")
    with pytest.raises(ValueError, match="kind must be one of"):
        convert_adapter(source, tmp_path / "new", kind="rosa")
    with pytest.raises(ValueError, match=r"sft has no option \['others'\]"):
        convert_adapter(source, tmp_path / "new", others="drop")
    with pytest.raises(FileExistsError, match="out exists already"):
        convert_adapter(source, tmp_path / "out")
    convert_adapter(source, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "new").exists()


def test_progress_is_reported_module_by_module(tmp_path: Path) -> None:
    source, seen = write_fork(tmp_path / "fork", fork_tensors()[0]), []
    convert_adapter(source, tmp_path / "out", progress=lambda *call: seen.append(call))
    assert [call[:2] for call in seen] == [(1, 2), (2, 2)] and {call[2] for call in seen} == {Q, DOWN}
    seen.clear()
    for export in (export_shira, export_sparse_patch, export_dense_diff):
        export(tmp_path / "out", tmp_path / export.__name__, tiny_llama(), progress=lambda *call: seen.append(call[:2]))
    assert seen == [(1, 2), (2, 2)] * 3


def test_settings_that_make_no_sense_are_named(tmp_path: Path) -> None:
    source = write_fork(tmp_path / "text", fork_tensors()[0], modules_to_save="lm_head")
    with pytest.raises(ValueError, match="adapter_config.json: modules_to_save must list names, got 'lm_head'"):
        convert_adapter(source, tmp_path / "out")
    source = write_fork(tmp_path / "rate", fork_tensors()[0], initial_reselection_rate=7)
    with pytest.raises(ValueError, match=rf"{FILE}: its settings make no valid SpIELConfig: .*initial_regrow_rate"):
        convert_adapter(source, tmp_path / "out")
    (source / "adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match="adapter_config.json cannot be read"):
        convert_adapter(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_converted_adapter_can_be_trained_on(tmp_path: Path) -> None:
    source = write_fork(tmp_path / "fork", fork_tensors()[0])
    convert_adapter(source, tmp_path / "out")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out", is_trainable=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 and all("spiel_delta" in name for name in trained)
