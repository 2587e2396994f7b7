"""Bases that are quantized by other libraries than bitsandbytes: trained and merged, or refused by name."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils import quantization_utils
from support.models import quantized_llama
from support.runs import assert_same_run
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from spiel_peft import SpIELConfig

IDS = torch.arange(24).view(2, 12)


def needs(package: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4))


def hqq(tmp_path: Any) -> PreTrainedModel:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = llama()
    for block in model.model.layers:
        settings = BaseQuantizeConfig(nbits=4, group_size=64)
        quantized = HQQLinear(block.self_attn.q_proj, settings, compute_dtype=torch.float32, device="cpu")
        block.self_attn.q_proj = quantized
    return model


def torchao(tmp_path: Any) -> PreTrainedModel:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    llama().save_pretrained(tmp_path)
    return LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))


@pytest.mark.parametrize(
    "quantized", [pytest.param(hqq, marks=needs("hqq")), pytest.param(torchao, marks=needs("torchao"))]
)
def test_a_quantized_base_is_trained_merged_and_restored(quantized: Any, tmp_path: Any) -> None:
    base = quantized(tmp_path)
    with torch.no_grad():
        plain = base(IDS).logits
    config = SpIELConfig(target_modules=["q_proj"], r=2, regrow_every=4, accumulation_steps=2, task_type="CAUSAL_LM")
    model = get_peft_model(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False), config)
    losses = train(model, 7)
    assert losses[-1] < losses[0]
    assert [report.step for report in model.base_model.cycle_log()] == [2, 6]
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    model.eval()
    with torch.no_grad():
        adapted = model(IDS).logits
        x = torch.randn(3, 64, dtype=plain.dtype)
        expected = x @ (layer.get_base_weight() + layer.get_delta_weight("default")).to(x.dtype).T
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, plain)
        with pytest.warns(UserWarning, match="rounds the result to the quantization grid"):
            model.merge_adapter()
        merged = layer.get_base_weight()
        model.unmerge_adapter()
        assert torch.equal(model(IDS).logits, adapted)
        step = (merged - layer.get_base_weight()).abs().max()
    assert step > 0
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(quantized(tmp_path / "again"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, adapted)


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_bitsandbytes_base_that_peft_has_prepared(bits: int, checkpointing: bool, tmp_path: Path) -> None:
    """The run on a base after `prepare_model_for_kbit_training` equals the run on a float32 base without it."""
    models = []
    for prepare in (True, False):
        base = quantized_llama(tmp_path / str(prepare), bits)
        if prepare:
            base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)
        config = SpIELConfig(target_modules=["q_proj"], r=2, regrow_every=4, accumulation_steps=2)
        model = get_peft_model(base, config)
        train(model, 7)
        assert [report.step for report in model.base_model.cycle_log()] == [2, 6]
        models.append(model)
    assert_same_run(*models)


class Packed(nn.Module):
    """A layer as GPTQModel's: packed integers, no weight that could be read."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 8
        self.register_buffer("qweight", torch.zeros(1, 8, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_quantizers_that_peft_cannot_read_are_refused_by_name(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQModel itself needs a compiler and a GPU; its layers are known by their class."""
    qlinear = types.ModuleType("gptqmodel.nn_modules.qlinear")
    qlinear.BaseQuantLinear = Packed if method == "gptq" else type("Other", (nn.Module,), {})
    for name in ("gptqmodel", "gptqmodel.nn_modules"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, qlinear.__name__, qlinear)
    monkeypatch.setattr(quantization_utils, "is_gptqmodel_available", lambda: True)
    monkeypatch.setattr(quantization_utils, "is_gptqmodel_awq_layer", lambda layer: isinstance(layer, Packed))
    net = nn.Sequential(nn.Linear(8, 8), Packed())
    before = list(net.state_dict())
    with pytest.raises(ValueError, match=f"1.*is quantized with {method}, whose weights PEFT cannot dequantize"):
        get_peft_model(net, SpIELConfig(target_modules=["0", "1"], density=0.5))
    assert list(net.state_dict()) == before


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_unknown_packed_layers_are_refused_by_name(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    net[0].weight = nn.Parameter(torch.zeros(8, 8, dtype=dtype), requires_grad=False)
    with pytest.raises(ValueError, match="no quantization backend of PEFT knows this layer"):
        get_peft_model(net, SpIELConfig(target_modules=["0"], density=0.5))
