"""Forward and backward pass of one linear layer: deltas, LoRA and the dense formula compared with the frozen layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from spiel_peft import SpIELConfig

from .environment import failure
from .index_sets import ProfileSampler
from .stepping import Failures
from .timing import Clock, interleave
from .variants import place_deltas, use_dense_formula

_ROUNDS_TO_WARM_UP = 2
FROZEN = "frozen linear"
REFERENCES = (FROZEN,)


class _Single(nn.Module):
    """A model of one layer; its name selects the profile of its deltas."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.q_proj = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


def _action(model: nn.Module, x: Tensor, grad_out: Tensor) -> Callable[[], None]:
    """Forward pass, backward pass and a step of SGD."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-6) if trained else None

    def action() -> None:
        model(x).backward(grad_out)
        x.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return action


def _variants(layer: nn.Module, density: float) -> dict[str, Callable[[], nn.Module]]:
    rows, cols = layer.weight.shape
    rank = max(1, round(density * rows * cols / (rows + cols)))

    def spiel(indices: str) -> nn.Module:
        config = SpIELConfig(density=density, target_modules=["q_proj"], growth="none")
        model = get_peft_model(_Single(copy.deepcopy(layer)), config)
        if indices == "profile":
            place_deltas(model, ProfileSampler.measured())
        return model

    def lora() -> nn.Module:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj"])
        return get_peft_model(_Single(copy.deepcopy(layer)), config)

    return {
        FROZEN: lambda: _Single(copy.deepcopy(layer)),
        "SpIEL, profile indices": lambda: spiel("profile"),
        "SpIEL, uniform indices": lambda: spiel("uniform"),
        f"LoRA, rank {rank}": lora,
        "dense formula": lambda: use_dense_formula(spiel("uniform").get_base_model()),
    }


def measure(
    rows: int,
    cols: int,
    density: float,
    tokens: int,
    repetitions: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    clock: Clock | None = None,
) -> dict[str, Any]:
    """Time forward pass, backward pass and SGD step of every variant in turn.

    Returns:
        ``settings``, ``seconds`` of every repetition by variant, ``failed`` errors by variant.
    """
    where = torch.device(device)
    layer = nn.Linear(cols, rows, bias=False, device=where, dtype=dtype).requires_grad_(False)
    x = torch.randn(tokens, cols, device=where, dtype=dtype).requires_grad_(True)
    grad_out = torch.randn(tokens, rows, device=where, dtype=dtype)
    failures: Failures = {}
    actions = {}
    for name, make in _variants(layer, density).items():
        try:
            action = _action(make(), x, grad_out)
            for _ in range(_ROUNDS_TO_WARM_UP):
                action()
            actions[name] = action
        except Exception as error:
            failures[name] = failure(error)
    settings = {"rows": rows, "cols": cols, "density": density, "tokens": tokens, "dtype": str(dtype).split(".")[1]}
    seconds = interleave(actions, repetitions, where, clock)
    return {"settings": settings, "seconds": seconds, "failed": failures}
