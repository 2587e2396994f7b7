"""Every kind of object that can be the base of a conversion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.adapters import adapted
from support.models import logits, tiny_bert, tiny_gpt2, tiny_llama
from transformers import GPT2LMHeadModel

from spiel_peft.convert import export_shira, export_sparse_patch, read_sparse_patches
from spiel_peft.files.checkpoint import open_base
from spiel_peft.weights.base_weight import EMBEDDING, LINEAR, TRANSPOSED

from .helpers import Q

QUERY = "bert.encoder.layer.0.attention.self.query"


def test_shapes_are_the_same_from_every_source(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "config")
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    sources = {
        "model": model,
        "config": model.config,
        "one": tmp_path / "one",
        "shards": str(tmp_path / "shards"),
        "config folder": tmp_path / "config",
        "file": tmp_path / "one" / "model.safetensors",
        "dict": expected,
        "tensors": model.state_dict(),
    }
    for name, source in sources.items():
        base = open_base(source)
        assert {n: base.shape(n, "test") for n in expected} == expected, name
        assert base.has_values == (name in ("model", "one", "shards", "file")), name
        if base.has_values:
            assert torch.equal(base.value(f"{Q}.weight", "test"), model.get_parameter(f"{Q}.weight"))
        else:
            with pytest.raises(ValueError, match=f"test: the values of tensor '{Q}.weight' are needed"):
                base.value(f"{Q}.weight", "test")
        if name not in ("file", "dict", "tensors"):
            assert base.info(Q).kind == LINEAR and base.info("model.embed_tokens").kind == EMBEDDING
            assert base.info("model.norm") is None


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="4KB")
    shard = sorted((tmp_path / "base").glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=f"{shard.name} cannot be read"):
        open_base(tmp_path / "base")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} is missing"):
        open_base(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        open_base(tmp_path / "empty")
    config = tiny_llama().config
    config.architectures = ["NoSuchModel"]
    with pytest.raises(ValueError, match=r"names no architecture that transformers knows \(\['NoSuchModel'\]\)"):
        open_base(config)


def test_a_model_with_an_adapter_on_it_is_no_base() -> None:
    with pytest.raises(ValueError, match="pass the base model without an adapter"):
        open_base(adapted())


def test_names_may_differ_by_leading_parts_but_not_be_ambiguous() -> None:
    base = open_base({"encoder.a.weight": (2, 3), "left.b.weight": (1, 1), "right.b.weight": (1, 1)})
    assert base.find("bert.encoder.a.weight") == base.find("a.weight") == "encoder.a.weight"
    assert base.find("left.b.weight") == "left.b.weight" and base.find("ba.weight") is None
    with pytest.raises(ValueError, match="'b.weight' could be any of"):
        base.find("b.weight")
    assert base.tensors_of("bert.encoder") == ["bert.encoder.a.weight"]


def test_a_patch_has_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    model = tiny_bert()
    model.bert.save_pretrained(tmp_path / "base")
    adapter = adapted(model, num_deltas={QUERY: 9}, task_type=None)
    adapter.save_pretrained(tmp_path / "adapter")
    export_sparse_patch(tmp_path / "adapter", tmp_path / "patch", tmp_path / "base")
    (patch,) = read_sparse_patches(tmp_path / "patch")
    assert patch.name == f"{QUERY.removeprefix('bert.')}.weight"
    assert patch.name in load_file(tmp_path / "base" / "model.safetensors")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["architectures"] == ["BertModel"]


def test_transposed_layers_are_no_linear_layers_to_shira_but_can_be_patched(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "base")
    model = adapted(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), target_modules=["c_attn"])
    model.save_pretrained(tmp_path / "adapter")
    assert open_base(tmp_path / "base").info("transformer.h.0.attn.c_attn").kind == TRANSPOSED
    with pytest.raises(
        ValueError, match="c_attn' is a layer of kind 'transposed', and SHiRA adapts linear layers only"
    ):
        export_shira(tmp_path / "adapter", tmp_path / "shira", tmp_path / "base")
    export_sparse_patch(tmp_path / "adapter", tmp_path / "patch", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for patch in read_sparse_patches(tmp_path / "patch"):
        weights[patch.name].view(-1)[patch.indices.long()] = patch.values
    fresh = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    missing = fresh.load_state_dict(weights, strict=False)
    assert missing.unexpected_keys == []
    assert torch.equal(logits(fresh), logits(PeftModel.from_pretrained(model.unload(), tmp_path / "adapter")))
