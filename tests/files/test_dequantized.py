"""Merging into the dequantized values of a base, which a quantized run was trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.adapters import adapted, layers_of
from support.checkpoints import contents, loaded, saved
from support.models import logits, tiny_gpt2, tiny_llama
from support.quantized import dequantized, needs_bitsandbytes_050
from support.tensors import same_bits
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from spiel_kernels import apply_deltas
from spiel_peft import merge_adapter_into_checkpoint

FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
CONFIGS = {
    "nf4": {**FOUR_BIT, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {**FOUR_BIT, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {**FOUR_BIT, "bnb_4bit_quant_type": "fp4"},
    "skipping": {**FOUR_BIT, "llm_int8_skip_modules": ["down_proj", "lm_head"]},
    "8bit": {"load_in_8bit": True},
}


@pytest.fixture()
def base(tmp_path: Path) -> Path:
    return saved(tiny_llama(hidden_size=64, intermediate_size=128), tmp_path / "base", "50KB")


def trained(
    base: Path, config: BitsAndBytesConfig, dtype: torch.dtype, targets: object = ("q_proj", "up_proj", "down_proj")
) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=dtype)
    return adapted(model, target_modules=targets)


@needs_bitsandbytes_050
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CONFIGS)
def test_the_merged_weights_are_those_of_training(tmp_path: Path, base: Path, case: str, dtype: torch.dtype) -> None:
    config = BitsAndBytesConfig(**CONFIGS[case])
    model = trained(base, config, dtype)
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter_into_checkpoint(
        base, tmp_path / "adapter", tmp_path / "out", quantization_config=config, load_dtype=dtype
    )
    merged = loaded(tmp_path / "out")
    quantized = 0
    for layer in layers_of(model):
        own, (indices, values) = layer.get_base_layer(), layer.spiel_delta["default"]()
        pairs = [(indices, values.detach())]
        if layer.quantization_backend is None:
            plain = loaded(base).get_submodule(layer.module_name).weight.detach()
        else:
            plain = layer.get_base_weight().to(dtype)
            assert torch.allclose(plain.float(), dequantized(own).float(), rtol=2**-7)
            quantized += 1
        wanted = apply_deltas(plain, pairs, torch.float32)
        assert same_bits(merged.get_submodule(layer.module_name).weight.detach(), wanted), layer.module_name
    assert quantized == (4 if case == "skipping" else 6)
    key = "model.layers.0.self_attn.k_proj"  # quantized, not adapted
    untrained = merged.get_submodule(key).weight.detach()
    plain = dequantized(model.base_model.model.get_submodule(key)).to(dtype).float()
    assert torch.allclose(untrained, plain, rtol=2**-7 if case == "8bit" else 0, atol=0)
    assert not torch.equal(untrained, loaded(base).get_submodule(key).weight)
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert same_bits(merged.get_parameter(name).detach(), loaded(base).get_parameter(name).detach())


def test_outputs_are_those_of_the_quantized_model(tmp_path: Path, base: Path) -> None:
    config = BitsAndBytesConfig(**CONFIGS["nf4-double"])
    # All layers are adapted: bitsandbytes computes the others in bfloat16 on some CPUs.
    model = trained(base, config, torch.float32, "all-linear")
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter_into_checkpoint(base, tmp_path / "adapter", tmp_path / "seen", quantization_config=config)
    merge_adapter_into_checkpoint(base, tmp_path / "adapter", tmp_path / "original")
    expected = logits(model)
    assert torch.allclose(logits(loaded(tmp_path / "seen")), expected, atol=1e-4)
    assert not torch.allclose(logits(loaded(tmp_path / "original")), expected, atol=1e-2)


def test_folders_of_quantized_weights_are_refused(tmp_path: Path, base: Path) -> None:
    config = BitsAndBytesConfig(**CONFIGS["nf4"])
    model = trained(base, config, torch.float32)
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "quantized")
    before = set(contents(tmp_path))
    with pytest.raises(ValueError, match="quantized with 'bitsandbytes'.*give it together with quantization_config"):
        merge_adapter_into_checkpoint(tmp_path / "quantized", tmp_path / "adapter", tmp_path / "out")
    assert set(contents(tmp_path)) == before


def test_transposed_layers_are_refused(tmp_path: Path) -> None:
    model = tiny_gpt2(64)
    base = saved(model, tmp_path / "base")
    adapted(model, target_modules=["c_attn"]).save_pretrained(tmp_path / "adapter")
    config = BitsAndBytesConfig(**CONFIGS["nf4"])
    with pytest.raises(ValueError, match="h.0.attn.c_attn is a transposed layer"):
        merge_adapter_into_checkpoint(base, tmp_path / "adapter", tmp_path / "out", quantization_config=config)
    assert not (tmp_path / "out").exists()
