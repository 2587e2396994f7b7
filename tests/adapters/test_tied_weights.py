"""Adapters on embeddings that are tied to the output layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.adapters import PREFIX, adapted, assert_unchanged, deltas_of, layers_of, read_adapter, snapshot, train
from support.models import IDS, logits, tiny_llama
from support.tensors import same_bits, texts
from torch import Tensor, nn
from torch.nn import functional as F

EMBED, HEAD = "model.embed_tokens", "lm_head"
TIED = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}


def tied_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny_llama(tied=True, dtype=dtype)


def base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def weights(model: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """The parameters of the input and the output embedding, below their adapters."""
    base = base_of(model)
    modules = (base.get_input_embeddings(), base.get_output_embeddings())
    pair = [module.get_base_layer() if hasattr(module, "get_base_layer") else module for module in modules]
    return pair[0].weight, pair[1].weight


def hidden(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return base_of(model).model(IDS).last_hidden_state


# --- the input embedding alone ---


def test_only_the_input_embedding_is_adapted() -> None:
    with pytest.warns(UserWarning, match="tie_word_embeddings=True.*ensure_weight_tying"):
        model = adapted(tied_llama(), target_modules=["embed_tokens"])
    assert list(deltas_of(model)) == [EMBED]
    plain = tied_llama()
    assert same_bits(logits(model), F.linear(hidden(model), plain.lm_head.weight.detach()))
    assert not torch.equal(hidden(model), hidden(plain))


def test_merging_one_of_two_tied_weights_parts_them_and_unmerging_joins_them() -> None:
    model = adapted(tied_llama(), target_modules=["embed_tokens"])
    before, expected = snapshot(model), logits(model)
    original = weights(model)[0]
    model.merge_adapter()
    embedding, head = weights(model)
    assert head is original and embedding is not original
    assert embedding.data_ptr() != head.data_ptr()
    assert same_bits(logits(model), expected)
    model.unmerge_adapter()
    assert weights(model)[0] is weights(model)[1] is original
    assert_unchanged(model, before)


def test_merge_and_unload_unties_the_config_as_well(tmp_path: Path) -> None:
    model = adapted(tied_llama(), target_modules=["embed_tokens"])
    expected = logits(model)
    with pytest.warns(UserWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    assert same_bits(logits(merged), expected)
    merged.save_pretrained(tmp_path)
    assert same_bits(logits(type(merged).from_pretrained(tmp_path)), expected)


def test_unload_leaves_the_weights_tied() -> None:
    base = adapted(tied_llama(), target_modules=["embed_tokens"]).unload()
    assert weights(base)[0] is weights(base)[1]
    assert_unchanged(base, snapshot(tied_llama()))


# --- both through one delta ---


@pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"], "embed_tokens"]
)
def test_one_delta_serves_both(targets: list[str] | str) -> None:
    model = adapted(tied_llama(), target_modules=targets, ensure_weight_tying=True)
    deltas = deltas_of(model)
    embedding = base_of(model).get_input_embeddings().spiel_delta["default"]
    head = base_of(model).get_output_embeddings().spiel_delta["default"]
    assert embedding is head
    assert len(deltas) == (4 if "q_proj" in targets else 2)
    dense = base_of(model).get_input_embeddings().get_delta_weight("default")
    adapted_weight = tied_llama().lm_head.weight.detach() + dense
    assert same_bits(logits(model), F.linear(hidden(model), adapted_weight))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == (3 if "q_proj" in targets else 1)


def test_the_gradient_is_the_sum_of_both_uses() -> None:
    model = adapted(tied_llama().double(), **TIED)
    delta = base_of(model).get_input_embeddings().spiel_delta["default"]
    dense = base_of(model).get_input_embeddings().get_delta_weight("default").double()
    model.train()
    model(IDS, labels=IDS).loss.backward()

    reference = tied_llama().double()
    with torch.no_grad():
        reference.lm_head.weight += dense
    reference(IDS, labels=IDS).loss.backward()
    expected = reference.lm_head.weight.grad.take(delta.indices.long())
    assert torch.allclose(delta.values.grad.double(), expected, rtol=1e-12, atol=0)
    assert expected.abs().min() >= 0 and expected.abs().max() > 1e-3


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_shared_delta_trains_saves_and_loads(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model = adapted(tied_llama(), regrow_every=2, accumulation_steps=1, total_steps=9, **TIED)
    indices = deltas_of(model)[EMBED].indices.clone()
    train(model, steps=5)
    assert not torch.equal(deltas_of(model)[EMBED].indices, indices)
    assert deltas_of(model)[EMBED] is deltas_of(model)[HEAD]
    assert deltas_of(model)[EMBED].state.step == 5
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tied_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True)
    assert same_bits(logits(loaded), logits(model))
    assert deltas_of(loaded)[EMBED] is deltas_of(loaded)[HEAD]
    assert deltas_of(loaded)[EMBED].state.step == 5
    train(loaded, steps=1)
    assert same_bits(weights(loaded)[0].detach(), tied_llama().lm_head.weight.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_keeps_the_weights_tied(dtype: torch.dtype) -> None:
    model = adapted(tied_llama(dtype), **TIED)
    before, expected, original = snapshot(model), logits(model), weights(model)[0]
    model.merge_adapter()
    embedding, head = weights(model)
    assert embedding.data_ptr() == head.data_ptr()
    assert same_bits(logits(model), expected)
    model.unmerge_adapter()
    assert weights(model)[0] is weights(model)[1] is original
    assert_unchanged(model, before)

    merged = model.merge_and_unload()
    assert weights(merged)[0].data_ptr() == weights(merged)[1].data_ptr()
    assert merged.config.tie_word_embeddings is True
    assert same_bits(logits(merged), expected)


# --- both, with a delta each ---


def test_two_targets_without_tying_get_two_deltas(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        model = adapted(tied_llama(), target_modules=["embed_tokens", "lm_head"])
    deltas = deltas_of(model)
    assert deltas.keys() == {EMBED, HEAD} and deltas[EMBED] is not deltas[HEAD]
    before, expected, original = snapshot(model), logits(model), weights(model)[0]
    model.merge_adapter()
    assert same_bits(logits(model), expected)
    model.unmerge_adapter()
    assert weights(model)[0] is weights(model)[1] is original
    assert_unchanged(model, before)
    model.save_pretrained(tmp_path)
    assert same_bits(logits(PeftModel.from_pretrained(tied_llama(), tmp_path)), expected)


# --- together with modules_to_save and trained tokens ---


@pytest.mark.parametrize("tied", [False, True])
def test_modules_to_save_with_tying(tmp_path: Path, tied: bool) -> None:
    model = adapted(tied_llama(), modules_to_save=["embed_tokens"], ensure_weight_tying=tied)
    embedding = base_of(model).get_input_embeddings().modules_to_save["default"].weight
    head = base_of(model).get_output_embeddings()
    assert (hasattr(head, "modules_to_save") and head.modules_to_save["default"].weight is embedding) == tied
    before = embedding.detach().clone()
    train(model)
    assert not torch.equal(embedding, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tied_llama(), tmp_path)
    assert same_bits(logits(loaded), logits(model))


def test_tying_nothing_warns() -> None:
    with pytest.warns(UserWarning) as record:
        adapted(tied_llama(), ensure_weight_tying=True)
        adapted(tiny_llama(), **TIED)
    assert "no tied modules are added" in texts(record)
    assert "no tied modules were found in the model" in texts(record)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [[3, 7], {"embed_tokens": [3, 7]}], ids=["list", "dict"])
def test_trainable_tokens_beside_deltas(tmp_path: Path, tied: bool, tokens: list[int] | dict[str, list[int]]) -> None:
    model = adapted(tiny_llama(tied=tied), trainable_token_indices=tokens)
    train(model)
    model.save_pretrained(tmp_path)
    saved = read_adapter(tmp_path)
    assert f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta" in saved
    assert f"{PREFIX}model.layers.0.self_attn.q_proj.spiel_delta.values" in saved
    loaded = PeftModel.from_pretrained(tiny_llama(tied=tied), tmp_path)
    assert same_bits(logits(loaded), logits(model))
    with model.disable_adapter():
        assert same_bits(logits(model), logits(tiny_llama(tied=tied)))
    embedding = model.merge_and_unload().get_input_embeddings().weight
    changed = (embedding != tiny_llama(tied=tied).get_input_embeddings().weight).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [3, 7]


def test_layers_of_a_tied_model_know_whom_they_share_with() -> None:
    model = adapted(tied_llama(), target_modules=["embed_tokens", "q_proj"])
    shared = {layer.module_name: layer.shared_with for layer in layers_of(model)}
    assert shared.pop(EMBED) == (HEAD,)
    assert set(shared.values()) == {()}
