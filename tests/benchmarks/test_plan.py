"""The command `plan`: its counts are those of real models, and docs/scaling.md has the results of the formulas."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from benchmarks_under_test import ROOT, plan
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from spiel_peft import SpIELConfig

SMALL = plan.Llama(hidden=64, intermediate=96, key_value=32, blocks=2, vocabulary=40)


def small_model() -> nn.Module:
    config = LlamaConfig(
        hidden_size=SMALL.hidden,
        intermediate_size=SMALL.intermediate,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=SMALL.blocks,
        vocab_size=SMALL.vocabulary,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_counts_are_those_of_a_real_model() -> None:
    model = small_model()
    assert SMALL.parameters == sum(p.numel() for p in model.parameters())
    line = plan.Plan(SMALL, plan.LORA, 4, "bf16", 8, sharded=False)
    lora = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert line.trained == trained(lora)
    spiel = get_peft_model(small_model(), SpIELConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert line.trained == trained(spiel)


def test_the_model_is_llama_2_70b() -> None:
    assert plan.LLAMA_70B.parameters == 68_976_648_192
    assert plan.LLAMA_70B.base_bytes(plan.BFLOAT16) == 2 * 68_976_648_192


def test_bytes_per_delta_are_those_of_the_design() -> None:
    """Value, gradient, index: 4 bytes each; AdamW 8; SM3 per row and column only; 16 per candidate."""
    ag, ma = (plan.Plan(SMALL, method, 1, "NF4", 8, sharded=True) for method in plan.METHODS[1:])
    assert (ag.values() + ag.optimizer()) / ag.trained == 20
    assert ma.values() / ma.trained == 12
    assert ma.optimizer() == 4 * SMALL.sides
    assert plan.CANDIDATE == 16
    assert ma.window() == ma.sent_for_growth() == 0


def test_nf4_is_as_large_as_bitsandbytes_makes_it() -> None:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.randn(512, 512), quant_type="nf4", blocksize=64, compress_statistics=True)
    bytes_held = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert bytes_held / 512**2 == pytest.approx(plan.NF4)


def test_rings() -> None:
    line = plan.Plan(SMALL, plan.LORA, 4, "bf16", 2, sharded=False)
    assert line.sent() == line.sent_for_gradients() == line.trained * 4
    sharded = plan.Plan(SMALL, plan.METHODS[2], 4, "bf16", 2, sharded=True)
    twice = SMALL.parameters - SMALL.norms - SMALL.embedding
    assert sharded.sent_for_weights() == 0.5 * 2 * (2 * twice + SMALL.embedding)


def test_the_page_is_what_the_formulas_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = plan.PAGE.read_text()
    assert plan.PAGE.is_relative_to(ROOT)
    assert plan.page(text) == text
    assert plan.page(text.replace("| NF4 |", "| 4-bit |")) == text
    plan.run(argparse.Namespace(write=False))
    printed = capsys.readouterr().out
    assert plan.table(plan.plans(sharded=True)) in printed and plan.table(plan.plans(sharded=False)) in printed
    assert text.count("SpIEL") > 8
