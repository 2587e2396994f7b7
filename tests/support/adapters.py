"""SpIEL adapters on tiny models: making, training and reading them, and their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spiel_peft import CycleReport, SpIELConfig, SpIELLayer
from spiel_peft.delta import SparseDelta
from support.models import IDS, tiny_llama
from support.tensors import same_bits

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


def spiel_config(**fields: Any) -> SpIELConfig:
    """Random deltas on the q and down projections of a causal LM, unless `fields` say otherwise."""
    if not {"r", "density", "num_deltas"} & fields.keys():
        fields["r"] = 2
    defaults: dict[str, Any] = {"init_weights": False, "task_type": "CAUSAL_LM"}
    if not isinstance(fields.get("num_deltas"), dict):
        defaults["target_modules"] = ["q_proj", "down_proj"]
    return SpIELConfig(**{**defaults, **fields})


def adapted(base: nn.Module | None = None, *, adapter: str = "default", seed: int = 1, **fields: Any) -> PeftModel:
    """A tiny Llama (or `base`) with one adapter."""
    base = tiny_llama() if base is None else base
    torch.manual_seed(seed)
    return get_peft_model(base, spiel_config(**fields), adapter_name=adapter).eval()


def layers_of(model: nn.Module) -> list[SpIELLayer]:
    """All SpIEL layers of a model."""
    return [module for module in model.modules() if isinstance(module, SpIELLayer)]


def deltas_of(model: nn.Module, adapter: str = "default") -> dict[str, SparseDelta]:
    """An adapter's deltas by module name."""
    return {layer.module_name: layer.spiel_delta[adapter] for layer in layers_of(model) if adapter in layer.spiel_delta}


def train(model: nn.Module, steps: int = 3, lr: float = 0.05) -> torch.optim.Optimizer:
    """Train on `IDS` for some steps of AdamW, closes included; returns the optimizer."""
    model.train()
    optimizer = torch.optim.AdamW(trainable(model), lr=lr)
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return optimizer


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state dict."""
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    """The model's state dict has the same keys as before, and every tensor the same bits."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert [key for key in before if not same_bits(before[key], after[key])] == []


def read_adapter(folder: Path | str) -> dict[str, Tensor]:
    """The tensors of an adapter file."""
    return load_file(Path(folder) / FILE)


def edit_adapter(folder: Path | str, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite an adapter file after `edit` has changed its dict of tensors in place."""
    tensors = read_adapter(folder)
    edit(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, Path(folder) / FILE)


def key_of(module_name: str, name: str) -> str:
    """Key of a SpIEL tensor in an adapter file."""
    return f"{PREFIX}{module_name}.spiel_delta.{name}"


def first_delta(model: nn.Module, adapter: str = "default") -> SparseDelta:
    """The delta of an adapter on the first adapted module."""
    return next(iter(deltas_of(model, adapter).values()))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def log_of(model: nn.Module, adapter: str = "default") -> list[CycleReport]:
    """The reports of an adapter's closes."""
    return first_delta(model, adapter).run.log


def indices_of(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Copies of an adapter's indices, by module name."""
    return {name: delta.indices.clone() for name, delta in deltas_of(model, adapter).items()}
