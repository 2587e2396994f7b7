"""Inspecting adapters whose targets are parameters themselves, such as fused experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.adapters import edit_adapter, key_of, spiel_config, train
from transformers import MixtralConfig, MixtralForCausalLM

from spiel_peft.inspection import adapter_facts, validate_adapter
from spiel_peft.inspection.plots import matrix_figure

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    config = MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path


def save(folders: Path, steps: int = 0, **fields: Any) -> Path:
    base = MixtralForCausalLM.from_pretrained(folders / "base")
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}
    model = get_peft_model(base, spiel_config(**targets, **fields))
    if steps:
        train(model, steps)
    model.save_pretrained(folders / "adapter")
    return folders / "adapter"


@pytest.mark.parametrize("budget", [{"r": 1}, {"density": 0.1}, {"num_deltas": 300}], ids=["r", "density", "count"])
def test_every_budget_is_sound(budget: dict[str, Any], folders: Path) -> None:
    adapter = save(folders, **budget)
    assert validate_adapter(adapter) == [] and validate_adapter(adapter, folders / "base") == []


def test_the_training_state_fits(folders: Path) -> None:
    adapter = save(folders, steps=4, density=0.1, growth="momentum", accumulation_steps=2)
    assert validate_adapter(adapter) == [] and validate_adapter(adapter, folders / "base") == []
    module = adapter_facts(adapter).modules[0]
    assert (module.module, module.shape, module.rows) == (EXPERTS, (144, 16), 144)


def test_shapes_and_the_map(folders: Path) -> None:
    facts = adapter_facts(save(folders, density=0.1), folders / "base")
    module = facts.modules[0]
    assert (module.module, module.shape, module.rows) == (EXPERTS, (3, 48, 16), 144)
    assert module.density == pytest.approx(0.1, abs=1e-3)
    figure = matrix_figure(module, facts.adapter.deltas[EXPERTS])
    assert any(ax.images and ax.images[0].get_array().shape == (144, 16) for ax in figure.axes)


def test_what_is_wrong_is_found(folders: Path) -> None:
    adapter = save(folders, density=0.1)
    edit_adapter(adapter, lambda t: t[key_of(EXPERTS, "indices")][-1:].fill_(3 * 48 * 16))
    (found,) = validate_adapter(adapter, folders / "base")
    assert found.tensor == f"{EXPERTS}.spiel_delta.indices" and "out of range" in found.problem
    edit_adapter(adapter, lambda t: [t.pop(key_of(EXPERTS, name)) for name in ("indices", "values")])
    (found,) = validate_adapter(adapter)
    assert found.tensor == "target_parameters" and "has 'experts.gate_up_proj'" in found.problem
