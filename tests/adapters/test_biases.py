"""Biases trained beside the deltas."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftModel
from support.adapters import adapted, assert_unchanged, read_adapter, snapshot, spiel_config, train
from support.models import logits, tiny_llama
from support.tensors import same_bits


@pytest.mark.parametrize("bias", ["all", "spiel_only"])
def test_biases_train_save_and_load(tmp_path: Path, bias: str) -> None:
    model = adapted(tiny_llama(attention_bias=True), bias=bias)
    biases = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".bias")}
    kinds = {name.split(".")[-3 if "base_layer" in name else -2] for name in biases}
    assert kinds == ({"q_proj"} if bias == "spiel_only" else {"q_proj", "k_proj", "v_proj", "o_proj"})
    before = snapshot(model)
    train(model)
    moved = {key for key, tensor in model.state_dict().items() if not same_bits(tensor, before[key])}
    assert biases <= moved
    model.save_pretrained(tmp_path)
    assert biases <= read_adapter(tmp_path).keys()
    loaded = PeftModel.from_pretrained(tiny_llama(attention_bias=True), tmp_path)
    assert same_bits(logits(loaded), logits(model))


def test_two_adapters_with_biases_are_refused() -> None:
    model = adapted(tiny_llama(attention_bias=True), bias="all")
    before = snapshot(model)
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("other", spiel_config(bias="all"))
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]
