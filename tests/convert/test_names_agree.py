"""A merge and an export change the same weights, however the names of adapter and base differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from support.adapters import adapted
from support.checkpoints import tensors_of
from support.models import tiny_bert, tiny_gpt2, tiny_llama
from torch import nn

from spiel_peft import SpIELConfig, merge_adapter_into_checkpoint
from spiel_peft.convert import export_sparse_patch, read_sparse_patches
from spiel_peft.files.adapter_file import AdapterFile, StoredDelta, config_of_deltas, write_adapter
from spiel_peft.files.checkpoint import open_base
from spiel_peft.inspection import adapter_facts

from .helpers import Q

QUERY = "bert.encoder.layer.0.attention.self.query"


def save(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder / "adapter")


def head_left_out(folder: Path) -> None:
    """The adapter was trained on a classifier; the base is the model's body, whose names lack the prefix."""
    model = tiny_bert()
    model.bert.save_pretrained(folder / "base")
    save(adapted(model, num_deltas={QUERY: 9}, task_type=None), folder)


def head_added(folder: Path) -> None:
    """The adapter was trained on the body; the base has a head, so its names have the prefix."""
    model = tiny_bert()
    model.save_pretrained(folder / "base")
    save(adapted(model.bert, num_deltas={QUERY.removeprefix("bert."): 9}, task_type=None), folder)


def wrapped(folder: Path) -> None:
    """The adapter was trained inside of a wrapper that transformers does not know."""
    model = tiny_llama()
    model.save_pretrained(folder / "base")
    wrapper = nn.Sequential()
    wrapper.add_module("auto_model", model)
    config = SpIELConfig(num_deltas={f"auto_model.{Q}": 7}, init_weights=False)
    save(get_peft_model(wrapper, config), folder)


def no_config(folder: Path) -> None:
    """The base is a file of tensors without a config, so its model is not known."""
    model = tiny_llama()
    (folder / "base").mkdir()
    save_file(
        {key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "base/model.safetensors"
    )
    save(adapted(model.model, num_deltas={Q.removeprefix("model."): 7}, task_type=None), folder)


def transposed(folder: Path) -> None:
    """The weight is stored transposed, in a body that is saved without its prefix."""
    model = tiny_gpt2()
    model.transformer.save_pretrained(folder / "base")
    save(adapted(model, target_modules=["c_attn"]), folder)


def tied(folder: Path) -> None:
    """Input and output embedding share a tensor and a delta."""
    model = tiny_llama(tied=True)
    model.save_pretrained(folder / "base")
    save(adapted(model, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True), folder)


def tokens(folder: Path) -> None:
    """Rows of a tied embedding are trained beside deltas, and the embedding is saved whole as well."""
    model = tiny_llama(tied=True)
    model.save_pretrained(folder / "base")
    trained = adapted(model, num_deltas={Q: 9}, trainable_token_indices=[5, 9])
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "token_adapter" in name and parameter.requires_grad:
                parameter.add_(1.0)
    trained.save_pretrained(folder / "adapter", save_embedding_layers=True)


CASES: list[Callable[[Path], None]] = [head_left_out, head_added, wrapped, no_config, transposed, tied, tokens]


@pytest.mark.parametrize("write", CASES, ids=lambda write: write.__name__)
def test_a_merge_and_an_export_change_the_same_weights(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    merge_adapter_into_checkpoint(base, adapter, tmp_path / "merged")
    export_sparse_patch(adapter, tmp_path / "patch", base)
    before = load_file(base / "model.safetensors")
    patched = {name: tensor.clone() for name, tensor in before.items()}
    for patch in read_sparse_patches(tmp_path / "patch"):
        patched[patch.name].view(-1)[patch.indices.long()] = patch.values
    merged = tensors_of(tmp_path / "merged")
    assert merged.keys() == patched.keys()
    assert all(torch.equal(merged[name], patched[name]) for name in merged)
    assert any(not torch.equal(merged[name], before[name]) for name in merged)
    # Inspection sees the shapes of these weights.
    changed = {tuple(merged[name].shape) for name in merged if not torch.equal(merged[name], before[name])}
    assert {module.shape for module in adapter_facts(adapter, base).modules} <= changed


def test_a_number_inside_of_a_name_is_no_wrapper() -> None:
    base = open_base({"norm.weight": (4,), "layers.0.norm.weight": (4,)})
    assert base.find("layers.1.norm.weight") is None
    assert base.find("0.auto_model.norm.weight") == base.find("bert.norm.weight") == "norm.weight"


def test_two_modules_cannot_mean_one_weight(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    delta = StoredDelta(torch.tensor([1, 5], dtype=torch.int32), torch.ones(2))
    deltas = {Q: delta, Q.removeprefix("model."): delta}
    write_adapter(AdapterFile(config_of_deltas(deltas), deltas), tmp_path / "adapter")
    message = f"the deltas of 'layers.*q_proj' and '{Q}' both belong to tensor '{Q}.weight'"
    with pytest.raises(ValueError, match=message):
        merge_adapter_into_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(ValueError, match=message):
        export_sparse_patch(tmp_path / "adapter", tmp_path / "patch", tmp_path / "base")
