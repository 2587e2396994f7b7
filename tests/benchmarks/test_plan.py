"""The command `plan`: what several GPUs add to counted bytes, and docs/scaling.md has its tables."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from benchmarks_under_test import ROOT, bases, memory, plan
from transformers import LlamaForCausalLM

MIB = 2**20
SETTINGS: dict[str, Any] = {
    "model": "small",
    "layers": 10,
    "base": "nf4",
    "r": 2,
    "base_bytes": {"layer": 4 * MIB, "embedding": 6 * MIB, "head": 6 * MIB, "widest": 100},
}
PARTS = {"base weights": 53 * MIB, "values": MIB, "gradients": MIB, "optimizer state": 2 * MIB, "temporary": MIB}
BETWEEN = {"bytes": sum(PARTS.values()), "during": "backward", "parts": PARTS}


def entry(variant: str, window: int = 0) -> dict[str, Any]:
    phases = {memory.BETWEEN: BETWEEN}
    if window:
        phases[memory.OPEN] = {"bytes": BETWEEN["bytes"] + window, "during": "", "parts": {**PARTS, "window": window}}
    return {
        "variant": variant,
        "checkpointing": True,
        "candidates": None,
        "phases": phases,
        "largest": {**PARTS, "window": window},
        "trainable": MIB // 4,
    }


LORA, AG, MA = entry(plan.LORA), entry("SpIEL-AG", 4 * MIB), entry("SpIEL-MA, SM3")


def test_one_gpu_needs_what_was_counted() -> None:
    line = plan.Plan(SETTINGS, AG)
    assert line.memory(memory.BETWEEN) == BETWEEN["bytes"]
    assert line.worst() == memory.OPEN
    assert line.memory(memory.OPEN) == BETWEEN["bytes"] + 4 * MIB
    assert plan.Plan(SETTINGS, LORA).sent() == plan.Plan(SETTINGS, AG).sent() == 0


def test_ddp_adds_buckets_and_a_shortlist() -> None:
    line = plan.Plan(SETTINGS, AG, gpus=8)
    assert line.memory(memory.BETWEEN) == BETWEEN["bytes"] + MIB
    proposals = 8 * 2 * 100 * 8
    assert line.memory(memory.OPEN) == BETWEEN["bytes"] + MIB + plan.SHORTLIST * 4 * MIB + proposals


def test_fsdp2_shards_the_base_and_loras_values() -> None:
    spiel, lora = (plan.Plan(SETTINGS, found, 8, sharded=True) for found in (MA, LORA))
    assert spiel.weights() == lora.weights() == 53 / 8 * MIB + 2 * 4 * MIB + 12 * MIB
    assert spiel.memory(memory.BETWEEN) == spiel.weights() + 5 * MIB
    assert lora.memory(memory.BETWEEN) == lora.weights() + 4 / 8 * MIB + MIB


def test_rings() -> None:
    line = plan.Plan(SETTINGS, LORA, 2)
    assert line.sent() == line.sent_for_gradients() == line.trained * 4
    sharded = plan.Plan(SETTINGS, MA, 2, sharded=True)
    assert sharded.sent_for_weights() == 0.5 * (2 * (40 + 6) + 6) * MIB
    assert sharded.sent_for_growth() == 0
    # 8 bytes of each proposal to the other rank; sums of 2 k and four times of k; once in 20 steps.
    assert plan.Plan(SETTINGS, AG, 2).sent_for_growth() == line.trained * (8 + 4 * 6) / 20


def test_the_largest_model_is_llama_2_70b() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(bases.llama_config(bases.LLAMA_2_70B, torch.bfloat16))
    assert sum(p.numel() for p in model.parameters()) == 68_976_648_192


@pytest.mark.parametrize("models", [plan.ON_ONE_GPU, plan.ON_EIGHT_GPUS])
def test_counts_of_large_models_are_there(models: tuple[str, ...]) -> None:
    lines = plan.plans(models)
    assert {line.settings["model"] for line in lines} == set(models)
    for model in models:
        assert {line.entry["variant"] for line in lines if line.settings["model"] == model} == set(memory.COUNTED)
        # r (in + out) values for every matrix, whichever method trains them.
        assert len({line.trained for line in lines if line.settings["model"] == model}) == 1


def test_the_page_has_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan.PAGE.read_text()
    assert plan.PAGE.is_relative_to(ROOT)
    assert plan.page(text) == text
    assert plan.page(text.replace("| nf4 |", "| 4-bit |")) == text
    plan.run(argparse.Namespace(write=False))
    printed = capsys.readouterr().out
    assert all(table in printed for table in plan.tables().values())
    assert text.count("SpIEL") > 8
