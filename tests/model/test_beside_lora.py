"""SpIEL beside LoRA in one model: what works, and what PEFT or SpIEL refuse."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from support.adapters import train
from support.models import logits, tiny_llama
from support.tensors import assert_close, assert_same_bits
from torch import nn
from transformers import LlamaForCausalLM

from spiel_peft import SparseDelta, SpIELConfig


def lora(*targets: str) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)


def spiel(*targets: str) -> SpIELConfig:
    return SpIELConfig(r=2, target_modules=list(targets), total_steps=8, regrow_every=3, accumulation_steps=2)


def trained(model: nn.Module) -> dict[str, int]:
    kinds = {"lora": 0, "spiel": 0, "other": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds[next((kind for kind in kinds if f".{kind}_" in name), "other")] += parameter.numel()
    return kinds


def both(targets: str) -> LlamaForCausalLM:
    """Add SpIEL first, so that LoRA wraps it on a module that has both."""
    model = tiny_llama()
    model.add_adapter(spiel(targets), "sparse")
    model.add_adapter(lora("q_proj"), "low_rank")
    model.set_adapter(["sparse", "low_rank"])
    return model


@pytest.mark.parametrize("targets", ["down_proj", "q_proj"])
def test_both_train_and_are_saved_one_by_one(targets: str, tmp_path: Path) -> None:
    model = both(targets)
    base = tiny_llama()
    kinds = trained(model)
    assert kinds["lora"] > 0 and kinds["spiel"] > 0 and kinds["other"] == 0
    deltas = [module for module in model.modules() if isinstance(module, SparseDelta)]
    start = [delta.indices.clone() for delta in deltas]
    before = logits(model)
    train(model, steps=8)
    assert not any(torch.equal(delta.indices, indices) for delta, indices in zip(deltas, start, strict=True))
    assert all(delta.values.any() for delta in deltas)
    out = logits(model)
    assert not torch.equal(out, before)

    for name in ("sparse", "low_rank"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
    loaded = copy.deepcopy(base)
    for name in ("sparse", "low_rank"):
        loaded.load_adapter(str(tmp_path / name), adapter_name=name)
    loaded.set_adapter(["sparse", "low_rank"])
    assert_same_bits(logits(loaded), out)
    alone = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "sparse")
    model.set_adapter("sparse")
    if targets != "q_proj":
        assert_same_bits(logits(alone), logits(model))

    loaded.disable_adapters()
    assert_same_bits(logits(loaded), logits(base))
    loaded.enable_adapters()
    # Merge the inner adapter first, as LoRA adds to the weight that it finds.
    for layer in reversed([module for module in loaded.modules() if isinstance(module, BaseTunerLayer)]):
        layer.merge()
    assert_close(logits(loaded), out, 1e-5)


def test_plain_injection_of_both() -> None:
    model = tiny_llama()
    inject_adapter_in_model(lora("q_proj"), model, "low_rank")
    inject_adapter_in_model(spiel("down_proj"), model, "sparse")
    kinds = trained(model)
    assert kinds["lora"] > 0 and kinds["spiel"] > 0 and kinds["other"] == 0


def test_lora_that_was_merged_before() -> None:
    merged = get_peft_model(tiny_llama(), lora("q_proj")).merge_and_unload()
    before = logits(merged)
    model = get_peft_model(merged, spiel("q_proj", "down_proj"))
    assert_same_bits(logits(model), before)
    train(model, steps=8)
    assert not torch.equal(logits(model), before)


def test_what_does_not_work_is_refused() -> None:
    model = get_peft_model(tiny_llama(), lora("q_proj"))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("sparse", spiel("down_proj"))
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_llama(), spiel("down_proj"), mixed=True)
    with pytest.raises(ValueError, match="carries adapters of another method.*add the SpIEL adapter first"):
        inject_adapter_in_model(spiel("q_proj"), model.base_model.model, "sparse")
