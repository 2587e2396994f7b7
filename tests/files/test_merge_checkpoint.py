"""Adapters merged into checkpoint files: the same outputs as unmerged, in a folder that loads without this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapters import spiel_config
from support.checkpoints import SHARD, PeakMemory, loaded, saved, tensors_of, trained_adapter, unmerged_logits
from support.models import IDS, logits, tiny_gpt2, tiny_llama
from support.tensors import same_bits, texts
from torch import nn
from transformers import AutoModelForSequenceClassification, MixtralConfig
from transformers import MixtralForCausalLM as Mixtral

from spiel_peft import merge_adapter_into_checkpoint
from spiel_peft.files import tensors as tensor_files
from spiel_peft.files.adapter_file import AdapterFile, StoredDelta, config_of_deltas, read_adapter, write_adapter

ADAPTERS = {
    "linears": {"target_modules": "all-linear"},
    "biases": {"bias": "all"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding-tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "saved-head": {"modules_to_save": ["lm_head", "norm"]},
    "saved-tied": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [1, 5]},
    "tokens-apart": {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [9]}},
}
UNTIES = {"embedding", "head", "saved-head", "tokens-apart"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_merged_outputs_are_the_adapter_s(tmp_path: Path, case: str, tied: bool, dtype: torch.dtype) -> None:
    model = tiny_llama(tied=tied, dtype=dtype)
    if case == "biases":
        model = with_biases(tied, dtype)
    base = saved(model, tmp_path / "base", SHARD)
    adapter = trained_adapter(base, tmp_path / "adapter", **ADAPTERS[case])
    report = merge_adapter_into_checkpoint(base, adapter, tmp_path / "out")
    merged = loaded(tmp_path / "out")
    assert merged.dtype == dtype and same_bits(logits(merged), unmerged_logits(base, adapter))
    assert not torch.equal(logits(merged), logits(loaded(base)))
    unties = tied and case in UNTIES
    assert report.untied == (["lm_head.weight"] if unties else [])
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == (tied and not unties)
    assert merged.config.tie_word_embeddings == (tied and not unties)
    assert report.loss.total > 0 and report.dtypes == {str(dtype).removeprefix("torch.")}


def with_biases(tied: bool, dtype: torch.dtype) -> nn.Module:
    model = tiny_llama(tied=tied, dtype=dtype)
    config = model.config
    config.attention_bias = True
    torch.manual_seed(0)
    return type(model)(config).to(dtype).eval()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["linears", "tokens", "saved-head"])
def test_float32_keeps_what_half_precision_would_lose(tmp_path: Path, stored: torch.dtype, case: str) -> None:
    base = saved(tiny_llama(tied=True, dtype=stored), tmp_path / "base", SHARD)
    adapter = trained_adapter(base, tmp_path / "adapter", torch.float32, **ADAPTERS[case])
    report = merge_adapter_into_checkpoint(base, adapter, tmp_path / "out", dtype="float32")
    merged = loaded(tmp_path / "out")
    assert merged.dtype == torch.float32 and report.loss.lost == 0
    assert same_bits(logits(merged), unmerged_logits(base, adapter, torch.float32))
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_a_sum_is_rounded_once(tmp_path: Path) -> None:
    """The float32 sum is rounded to bfloat16, not the base before the sum."""
    base = saved(tiny_llama(), tmp_path / "base")
    adapter = trained_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    merge_adapter_into_checkpoint(base, adapter, tmp_path / "out", dtype=torch.bfloat16)
    exact = PeftModel.from_pretrained(loaded(base), adapter).merge_and_unload().state_dict()
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert same_bits(tensor, exact[name].bfloat16()), name


def test_the_index_says_what_is_there(tmp_path: Path) -> None:
    base = saved(tiny_llama(tied=True, dtype=torch.bfloat16), tmp_path / "base", SHARD)
    adapter = trained_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    merge_adapter_into_checkpoint(base, adapter, tmp_path / "out", dtype="float32")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert index["weight_map"] == {key: name for name, tensors in files.items() for key in tensors}
    tensors = [tensor for held in files.values() for tensor in held.values()]
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in tensors)
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors)
    assert files.keys() == {path.name for path in base.glob("*.safetensors")}


def test_only_what_belongs_to_the_model_is_copied(tmp_path: Path) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    adapter = trained_adapter(base, tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "modeling_own.py"):
        (base / name).write_text(f"base {name}")
    old = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", "README.md")
    for name in (*old, "model.gguf", "tf_model.h5", "adapter_config.json"):
        (base / name).write_text("old")
    (base / "checkpoint-5").mkdir()
    (base / "checkpoint-5" / "model.safetensors").write_text("old")
    merge_adapter_into_checkpoint(base, adapter, tmp_path / "out")
    kept = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "modeling_own.py"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == kept | {"config.json", "model.safetensors"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "base tokenizer.json"
    # Training added tokens: the adapter's folder has the tokenizer with them.
    (adapter / "tokenizer_config.json").write_text("adapter")
    merge_adapter_into_checkpoint(base, adapter, tmp_path / "own")
    assert (tmp_path / "own" / "tokenizer_config.json").read_text() == "adapter"
    assert not (tmp_path / "own" / "tokenizer.json").exists()


LOADS = """
import sys, torch
from transformers import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(torch.tensor(eval(sys.argv[3]))).logits, sys.argv[2])
assert not {"spiel_peft", "spiel_kernels"} & sys.modules.keys()
"""


def test_the_result_loads_where_this_package_is_not(tmp_path: Path) -> None:
    base = saved(tiny_llama(dtype=torch.bfloat16), tmp_path / "base", SHARD)
    adapter = trained_adapter(base, tmp_path / "adapter")
    merge_adapter_into_checkpoint(base, adapter, tmp_path / "out")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", LOADS, str(tmp_path / "out"), str(tmp_path / "logits"), str(IDS.tolist())]
    subprocess.run(command, check=True, env=env, cwd=tmp_path, capture_output=True, timeout=120)
    assert same_bits(torch.load(tmp_path / "logits"), unmerged_logits(base, adapter))


def test_several_adapters_add_up_with_their_weights(tmp_path: Path) -> None:
    base = saved(tiny_llama(dtype=torch.bfloat16), tmp_path / "base")
    folders = [trained_adapter(base, tmp_path / f"adapter{i}", seed=i) for i in range(2)]
    model = PeftModel.from_pretrained(loaded(base), folders[0], adapter_name="a")
    model.load_adapter(folders[1], "b")
    model.base_model.set_adapter(["a", "b"])
    merge_adapter_into_checkpoint(base, folders, tmp_path / "sum")
    assert same_bits(logits(loaded(tmp_path / "sum")), logits(model))
    merge_adapter_into_checkpoint(base, folders, tmp_path / "weighted", weights=[0.5, -2])
    before, after = tensors_of(base), tensors_of(tmp_path / "weighted")
    wanted = before["model.layers.0.self_attn.q_proj.weight"].float()
    for folder, weight in zip(folders, (0.5, -2), strict=True):
        delta = PeftModel.from_pretrained(loaded(base), folder).base_model.model.model.layers[0].self_attn.q_proj
        wanted = wanted + weight * delta.get_delta_weight("default")
    assert same_bits(after["model.layers.0.self_attn.q_proj.weight"], wanted.bfloat16())
    head = trained_adapter(base, tmp_path / "head", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"head replaces a whole tensor \(lm_head.weight\), which cannot be weighted"):
        merge_adapter_into_checkpoint(base, [folders[0], head], tmp_path / "no", weights=[1, 0.5])
    with pytest.raises(ValueError, match="weights has 1 entries for 2 adapters"):
        merge_adapter_into_checkpoint(base, folders, tmp_path / "no", weights=[1])


def test_an_embedding_s_delta_can_be_weighted(tmp_path: Path) -> None:
    """PEFT saves the whole embedding beside its delta. It replaces nothing if it equals the base's embedding."""
    base = saved(tiny_llama(), tmp_path / "base")
    adapter = trained_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    assert "model.embed_tokens.base_layer.weight" in read_adapter(adapter).others
    merge_adapter_into_checkpoint(base, adapter, tmp_path / "out", weights=[0.25])
    wanted = tensors_of(base)["model.embed_tokens.weight"].clone()
    delta = read_adapter(adapter).deltas["model.embed_tokens"]
    wanted.view(-1)[delta.indices.long()] += 0.25 * delta.values
    assert same_bits(tensors_of(tmp_path / "out")["model.embed_tokens.weight"], wanted)


def test_a_budget_above_the_weight_s_size_is_no_news(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    adapter = trained_adapter(base, tmp_path / "adapter", r=30)
    assert "trained whole" in texts(recwarn.list)
    recwarn.clear()
    merge_adapter_into_checkpoint(base, adapter, tmp_path / "out")
    assert "trained whole" not in texts(recwarn.list)


def test_transposed_layers(tmp_path: Path) -> None:
    base = saved(tiny_gpt2(), tmp_path / "base")
    adapter = trained_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "c_proj"], bias="spiel_only")
    merge_adapter_into_checkpoint(base, adapter, tmp_path / "out")
    assert same_bits(logits(loaded(tmp_path / "out")), unmerged_logits(base, adapter))


@pytest.mark.parametrize("direction", ["headless base", "headless adapter"])
def test_names_with_and_without_a_head_s_prefix(tmp_path: Path, direction: str) -> None:
    whole = saved(tiny_llama(), tmp_path / "whole")
    inner = saved(tiny_llama().model, tmp_path / "inner")
    if direction == "headless base":
        base, adapter = inner, trained_adapter(whole, tmp_path / "adapter")
    else:
        torch.manual_seed(1)
        model = get_peft_model(tiny_llama().model, spiel_config(task_type=None))
        model.save_pretrained(tmp_path / "adapter")
        base, adapter = whole, tmp_path / "adapter"
    report = merge_adapter_into_checkpoint(base, adapter, tmp_path / "out")
    assert set(report.modules) and report.loss.total == 288
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.split(".")[-2] for key in changed} == {"q_proj", "down_proj"} and len(changed) == 4


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=40, num_key_value_heads=1, num_local_experts=2, **shape)
    return Mixtral(config).eval()


def test_files_with_other_names_than_the_model(tmp_path: Path) -> None:
    """Mixtral's files say block_sparse_moe.gate where the model says mlp.gate, and hold each expert apart."""
    base = saved(mixtral(), tmp_path / "base")
    assert "model.layers.0.block_sparse_moe.gate.weight" in tensors_of(base)
    adapter = trained_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["mlp.gate"])
    merge_adapter_into_checkpoint(base, adapter, tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == tensors_of(base).keys()
    assert same_bits(logits(loaded(tmp_path / "out")), unmerged_logits(base, adapter))


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("in_full", [False, True], ids=["delta", "in full"])
def test_fused_experts_are_taken_apart(tmp_path: Path, name: str, in_full: bool) -> None:
    """transformers 5 has one parameter for all experts, while the files hold a tensor per expert and projection."""
    base = saved(mixtral(), tmp_path / "base")
    fused = f"model.layers.0.mlp.experts.{name}"
    wanted = loaded(base)
    parameter = wanted.get_parameter(fused).detach()
    if in_full:
        adapter = AdapterFile(spiel_config(), {}, {fused: torch.randn(parameter.shape)})
        parameter.copy_(adapter.others[fused])
    else:
        indices = torch.randperm(parameter.numel())[:100].sort().values.to(torch.int32)
        deltas = {fused: StoredDelta(indices, torch.randn(100))}
        adapter = AdapterFile(config_of_deltas(deltas), deltas)
        parameter.view(-1)[indices.long()] += deltas[fused].values
    write_adapter(adapter, tmp_path / "adapter")
    report = merge_adapter_into_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == tensors_of(base).keys()
    assert report.loss.total == (0 if in_full else 100)
    merged, expected = loaded(tmp_path / "out").state_dict(), wanted.state_dict()
    assert [key for key in expected if not same_bits(merged[key], expected[key])] == []


def test_layouts_that_are_not_rows_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(mixtral(), tmp_path / "base")
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    deltas = {fused: StoredDelta(torch.tensor([2 * 16 * 16], dtype=torch.int32), torch.ones(1))}
    write_adapter(AdapterFile(config_of_deltas(deltas), deltas), tmp_path / "adapter")
    with pytest.raises(ValueError, match=rf"'{fused}': index 512 is outside of the weight of shape \(2, 16, 16\)"):
        merge_adapter_into_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    monkeypatch.setattr("spiel_peft.files.edits._ROW_WISE", {"MergeModulelist"})
    message = rf"{fused}.*cannot be merged into files: .*experts\.\d\.w\d.*merge_and_unload"
    with pytest.raises(ValueError, match=message):
        merge_adapter_into_checkpoint(base, tmp_path / "adapter", tmp_path / "out")


def test_a_classifier_becomes_a_model_of_its_own_kind(tmp_path: Path) -> None:
    base = saved(tiny_llama(tied=True, dtype=torch.bfloat16), tmp_path / "base")

    def classifier(folder: Path) -> nn.Module:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
        model.config.pad_token_id = 0
        return model

    model = get_peft_model(classifier(base), spiel_config(task_type="SEQ_CLS")).eval()
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter_into_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and len(config["id2label"]) == 3
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    merged.config.pad_token_id = 0
    reference = PeftModel.from_pretrained(classifier(base), tmp_path / "adapter")
    assert merged.num_labels == 3 and same_bits(logits(merged), logits(reference))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_resized_vocabulary_is_taken_from_the_adapter(tmp_path: Path, tied: bool) -> None:
    base = saved(tiny_llama(tied=tied), tmp_path / "base")
    model = loaded(base)
    model.resize_token_embeddings(44)
    model = get_peft_model(model, spiel_config()).eval()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merge_adapter_into_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    merged = loaded(tmp_path / "out")
    assert merged.config.vocab_size == 44 and merged.config.tie_word_embeddings == tied
    assert same_bits(logits(merged), logits(model))


@pytest.mark.parametrize("targets", ["q_proj", "embed_tokens"])
@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_weights_are_read_and_written_as_safetensors(tmp_path: Path, shards: int, targets: str) -> None:
    """``.bin`` files hold tied weights under all their names."""
    base = saved(tiny_llama(tied=True), tmp_path / "base")
    adapter = trained_adapter(base, tmp_path / "adapter", target_modules=[targets])
    expected = unmerged_logits(base, adapter)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (base / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, base / "pytorch_model.bin")
    else:
        index: dict[str, str] = {}
        for number, keys in enumerate((list(tensors)[:9], list(tensors)[9:]), 1):
            name = f"pytorch_model-0000{number}-of-00002.bin"
            torch.save({key: tensors[key] for key in keys}, base / name)
            index |= dict.fromkeys(keys, name)
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    report = merge_adapter_into_checkpoint(base, adapter, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").glob("*model*")}
    sharded = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    assert names == ({"model.safetensors"} if shards == 1 else sharded)
    assert report.untied == (["lm_head.weight"] if targets == "embed_tokens" else [])
    merged = loaded(tmp_path / "out")
    assert same_bits(logits(merged), expected) and merged.config.tie_word_embeddings == (targets == "q_proj")


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    base = saved(tiny_llama(), tmp_path / "base", SHARD)
    adapter = trained_adapter(base, tmp_path / "adapter")
    seen: list[tuple[int, int, str]] = []
    merge_adapter_into_checkpoint(base, adapter, tmp_path / "out", progress=lambda *event: seen.append(event))
    assert [event[2] for event in seen] == [key for key in sorted(tensors_of(base), key=[e[2] for e in seen].index)]
    assert seen[-1][0] == seen[-1][1] == sum(tensor.numel() for tensor in tensors_of(base).values())


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """Merging 96 MiB in one file of three equal tensors takes less memory than one tensor."""
    base = tmp_path / "base"
    base.mkdir()
    save_file({f"{layer}.weight": torch.randn(2048, 4096) for layer in "abc"}, base / "model.safetensors")
    positions = torch.arange(0, 2048 * 4096, 50, dtype=torch.int32)
    deltas = {layer: StoredDelta(positions, torch.full((positions.numel(),), 0.5)) for layer in "ac"}
    write_adapter(AdapterFile(config_of_deltas(deltas), deltas), tmp_path / "adapter")
    del deltas
    with pytest.MonkeyPatch.context() as patch, PeakMemory() as memory:
        for name in ("spiel_peft.files.tensors.PIECE_BYTES", "spiel_peft.files.merge.PIECE_BYTES"):
            patch.setattr(name, tensor_files.PIECE_BYTES // 16)
        patch.setattr("spiel_peft.files.merge._ENTRIES", tensor_files.PIECE_BYTES // 8)
        merge_adapter_into_checkpoint(base, tmp_path / "adapter", tmp_path / "out", dtype="float32")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert torch.equal(before["b.weight"], after["b.weight"])
    before["a.weight"].view(-1)[::50] += 0.5
    assert torch.equal(before["a.weight"], after["a.weight"])
    assert memory.growth < 2048 * 4096 * 4
