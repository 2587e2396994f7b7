"""Tiny models with language adapters and a task adapter that overlap in some modules, and dense counterparts."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from support.adapters import adapted, deltas_of, spiel_config
from support.models import tiny_llama
from torch import Tensor, nn

LANGUAGE, TASK = "language", "task"
LANGUAGES = ["german", "spanish", "finnish"]
CYCLE = {"regrow_every": 4, "accumulation_steps": 2, "total_steps": 12}


def two_adapters(base: nn.Module | None = None, **fields: Any) -> PeftModel:
    """Random deltas at different positions: languages on q and down projections, the task on down and up ones."""
    model = adapted(base, adapter=LANGUAGE, density=0.2, seed=11, **fields)
    model.add_adapter(TASK, spiel_config(density=0.2, target_modules=["down_proj", "up_proj"], **{"seed": 5, **fields}))
    return model


def model_with_languages(base: nn.Module | None = None, **fields: Any) -> PeftModel:
    """Languages with random deltas on q and down projections (one of them elsewhere too), and a task."""
    model = adapted(base, adapter=LANGUAGES[0], density=0.2, seed=7)
    model.add_adapter(LANGUAGES[1], spiel_config(density=0.2, seed=1))
    model.add_adapter(LANGUAGES[2], spiel_config(density=0.2, seed=2, target_modules=["down_proj", "gate_proj"]))
    model.add_adapter(TASK, spiel_config(density=0.2, seed=3, target_modules=["down_proj", "up_proj"], **fields))
    return model.train()


def batches(count: int) -> list[Tensor]:
    return list(torch.randint(1, 40, (count, 2, 5), generator=torch.Generator().manual_seed(0)))


def dense_deltas(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """An adapter's deltas as float64 tensors in the shape of the weights, made entry by entry."""
    out = {}
    for name, delta in deltas_of(model, adapter).items():
        dense = torch.zeros(delta.numel, dtype=torch.float64)
        for position, value in zip(delta.indices.tolist(), delta.values.tolist(), strict=True):
            dense[position] += value
        out[name] = dense.view(delta.weight_shape)
    return out


def plain_with(deltas: list[dict[str, Tensor]], base: nn.Module | None = None) -> nn.Module:
    """A base model without adapters, its weights plus the sum of dense deltas, summed in float64, rounded once."""
    base = tiny_llama() if base is None else base
    with torch.no_grad():
        for name in {name for each in deltas for name in each}:
            weight = base.get_submodule(name).weight
            weight.copy_(weight.double() + sum(each[name] for each in deltas if name in each))
    return base
