"""Tiny models with SpIEL adapters, and exact comparisons of models, files and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from spiel_peft import SpIELConfig
from spiel_peft.delta import SparseDelta
from spiel_peft.layers import SpIELLayer

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
IDS = torch.tensor([[1, 5, 2, 9, 11], [7, 3, 30, 4, 9]])
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_llama(*, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, **shape: int) -> nn.Module:
    """A Llama with random weights of some size, so that deltas and rounding both show."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=40, tie_word_embeddings=tied, **{**SHAPE, **shape})
    config.initializer_range = 0.2
    return LlamaForCausalLM(config).to(dtype).eval()


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


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def layers_of(model: nn.Module) -> list[SpIELLayer]:
    return [module for module in model.modules() if isinstance(module, SpIELLayer)]


def deltas_of(model: nn.Module, adapter: str = "default") -> dict[str, SparseDelta]:
    """An adapter's deltas by module name."""
    return {layer.module_name: layer.spiel_delta[adapter] for layer in layers_of(model) if adapter in layer.spiel_delta}


def train(model: nn.Module, steps: int = 3, lr: float = 0.05) -> torch.optim.Optimizer:
    """Fit the tiny batch for some AdamW steps, which runs the cycle too."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return optimizer


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything in the model's state dict."""
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit; NaNs too."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    """The model's state dict has the same keys as before, and every tensor the same bits."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert [key for key in before if not same_bits(before[key], after[key])] == []


def read_adapter(folder: Path | str) -> dict[str, Tensor]:
    return load_file(Path(folder) / FILE)


def edit_adapter(folder: Path | str, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite an adapter file after `edit` has changed its dict of tensors in place."""
    tensors = read_adapter(folder)
    edit(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, Path(folder) / FILE)


def key_of(module_name: str, name: str) -> str:
    """Key of a SpIEL tensor in an adapter file."""
    return f"{PREFIX}{module_name}.spiel_delta.{name}"


def texts(record: Iterable[Any]) -> str:
    """All warnings of a `pytest.warns` block or `catch_warnings` list in one string."""
    return "\n".join(str(warning.message) for warning in record)
