"""Merging into NF4 weights warns of the deltas it loses, and unmerging restores the packed bytes."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from support.adapters import adapted, deltas_of, layers_of
from support.models import logits, tiny_llama
from support.tensors import same_bits, texts
from torch import nn

WIDE = {"hidden_size": 64, "intermediate_size": 128}


def quantized_llama(double: bool = False) -> nn.Module:
    """A tiny Llama whose linear layers, but for the head, hold NF4 weights."""
    model = tiny_llama(**WIDE)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        layer = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=torch.float32,
            quant_type="nf4",
            compress_statistics=double,
        )
        layer.weight = bnb.nn.Params4bit(
            module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=double
        )
        layer.support_avx512bf16_for_cpu = False  # or bitsandbytes repacks the weight for its bfloat16 kernels
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.to("cpu"))
    model.is_loaded_in_4bit = True
    return model.eval()


def packed(model: nn.Module) -> list[torch.Tensor]:
    return [layer.get_base_layer().weight.detach().clone() for layer in layers_of(model)]


def absmax(model: nn.Module) -> list[torch.Tensor]:
    return [layer.get_base_layer().weight.quant_state.absmax.clone() for layer in layers_of(model)]


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_merge_warns_and_unmerge_restores_the_packed_bytes(double: bool) -> None:
    model = adapted(quantized_llama(double))
    before, scales, expected = packed(model), absmax(model), logits(model)
    with pytest.warns(UserWarning) as record:
        model.merge_adapter()
    assert "rounds the result to the quantization grid" in texts(record)
    assert "Quantization lost" in texts(record)
    merged = logits(model)
    assert not torch.equal(merged, expected)
    assert not any(torch.equal(a, b) for a, b in zip(packed(model), before, strict=True))
    model.unmerge_adapter()
    assert all(same_bits(a, b) for a, b in zip(packed(model), before, strict=True))
    assert all(same_bits(a, b) for a, b in zip(absmax(model), scales, strict=True))
    assert same_bits(logits(model), expected)


def lost_share(size: float) -> tuple[int, int]:
    """``(lost, all)`` deltas as the warning gives them, for deltas of this size."""
    model = adapted(quantized_llama())
    for delta in deltas_of(model).values():
        delta.values.data.copy_(torch.where(torch.arange(delta.k) % 2 == 0, size, -size))
    with pytest.warns(UserWarning) as record:
        model.merge_adapter()
    words = next(line for line in texts(record).splitlines() if line.startswith("Quantization lost")).split()
    return int(words[2]), int(words[4])


def test_the_warning_counts_what_was_lost() -> None:
    total = sum(delta.k for delta in deltas_of(adapted(quantized_llama())).values())
    small, large = lost_share(1e-4), lost_share(0.5)
    assert small[1] == large[1] == total
    assert small[0] > 0.9 * total and large[0] < 0.1 * total


def test_merge_and_unload_warns_once_about_the_loss_and_leaves_quantized_layers() -> None:
    model = adapted(quantized_llama())
    with pytest.warns(UserWarning) as record:
        merged = model.merge_and_unload()
    assert texts(record).count("Quantization lost") == 1
    assert not layers_of(merged)
    assert isinstance(merged.model.layers[0].self_attn.q_proj, bnb.nn.Linear4bit)


def test_safe_merge_refuses_before_any_byte_changes() -> None:
    model = adapted(quantized_llama())
    deltas_of(model)["model.layers.1.mlp.down_proj"].values.data[0] = float("nan")
    before = packed(model)
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert all(same_bits(a, b) for a, b in zip(packed(model), before, strict=True))


def test_unload_and_disable_give_the_quantized_model_back() -> None:
    plain = logits(quantized_llama())
    model = adapted(quantized_llama())
    with model.disable_adapter():
        assert same_bits(logits(model), plain)
    assert not torch.equal(logits(model), plain)
    assert same_bits(logits(model.unload()), plain)
