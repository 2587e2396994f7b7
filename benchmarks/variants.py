"""The ways of training that are compared; the measurements of time and memory set each up in the same way.

=============================  =======================================================================================
lower bound                    forward pass and input gradients through the frozen model; nothing is trained
LoRA                           PEFT's, alpha = 2 r, AdamW
LoRA, dropout 0.05             the same with dropout on the adapters' input
SpIEL-AG                       AdamW; positions that the first close chose by the gradients of the batches
SpIEL-MA, SM3                  momentum growth and its optimizer; positions as above
..., profile indices           positions drawn from the profile of SmolLM2's gradients, which never move
..., uniform indices           positions drawn uniformly, which never move
dense formula                  W + scatter(delta) as an autograd expression, AdamW; uniform positions
full fine-tuning               AdamW on all weights
=============================  =======================================================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from spiel_peft import SM3, SparseDelta, SpIELConfig, SpIELLayer

from .index_sets import ProfileSampler

LEARNING_RATE = 1e-5
# Adapters close their first cycle at step 5; after one more step, nothing else is allocated.
FIRST_CLOSE = 5
_NEVER = 10_000


@dataclass(frozen=True)
class Budget:
    """How much is trained: the rank of LoRA, and the settings of SpIELConfig that train as many values."""

    rank: int
    spiel: dict[str, Any]

    @staticmethod
    def of_rank(r: int) -> Budget:
        return Budget(r, {"r": r})

    @staticmethod
    def of_density(model: Any, density: float) -> Budget:
        """Budget for a density of SpIEL; LoRA gets the rank (at least 1) with the nearest number of values."""
        head = model.get_output_embeddings()
        shapes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        per_rank = sum(rows + cols for rows, cols in shapes)
        return Budget(
            max(1, round(density * sum(rows * cols for rows, cols in shapes) / per_rank)), {"density": density}
        )


class TrainingRun:
    """A model in training; a call of `step` is one optimizer step.

    Attributes:
        model: the model, with its adapter.
        trainable: number of trained values.
        warmup_steps: number of steps before the steady state.
    """

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer | None, warmup_steps: int = 2) -> None:
        self.model = model.train()
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def loss(self, ids: Tensor) -> Tensor:
        """Forward pass on a batch ``[batch, tokens]``; the loss is over all positions."""
        with _autocast(self.model):
            return self.model(labels=ids, use_cache=False, **self._inputs(ids)).loss

    def step(self, ids: Tensor) -> None:
        """Forward pass, backward pass and update on a batch ``[batch, tokens]``."""
        self.loss(ids).backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _inputs(self, ids: Tensor) -> dict[str, Tensor]:
        if self.optimizer is not None:
            return {"input_ids": ids}
        # The lower bound trains nothing, so the embeddings must require a gradient for the backward pass to run.
        return {"inputs_embeds": self.model.get_input_embeddings()(ids).requires_grad_(True)}

    def use_checkpointing(self, on: bool) -> None:
        """Recompute activations of decoder layers in backward, or not."""
        if on:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()


def _autocast(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Autocast as a trainer with bf16=True uses it; none for float32 models."""
    weight = model.get_output_embeddings().weight
    if weight.dtype != torch.bfloat16:
        return contextlib.nullcontext()
    return torch.autocast(weight.device.type, torch.bfloat16)


def _adamw(model: Any) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=parameters[0].is_cuda or None)


def _sm3(model: Any) -> torch.optim.Optimizer:
    return SM3([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def _lower_bound(base: Any, budget: Budget) -> TrainingRun:
    return TrainingRun(base.requires_grad_(False), None)


def _full(base: Any, budget: Budget) -> TrainingRun:
    return TrainingRun(base.requires_grad_(True), _adamw(base))


def _lora(dropout: float) -> Callable[[Any, Budget], TrainingRun]:
    def build(base: Any, budget: Budget) -> TrainingRun:
        config = LoraConfig(
            r=budget.rank, lora_alpha=2 * budget.rank, lora_dropout=dropout, target_modules="all-linear"
        )
        model = get_peft_model(base, config)
        return TrainingRun(model, _adamw(model))

    return build


def _dense(base: Any, budget: Budget) -> TrainingRun:
    model = use_dense_formula(get_peft_model(base, spiel_config(budget, growth="none")).get_base_model())
    return TrainingRun(model, _adamw(model))


def spiel_config(budget: Budget, **settings: Any) -> SpIELConfig:
    """SpIEL on all linear layers, with so many total steps that the schedule hardly moves while it is measured."""
    return SpIELConfig(target_modules="all-linear", total_steps=2 * _NEVER, **budget.spiel, **settings)


def _spiel(growth: str, make_optimizer: Callable[[Any], Any], indices: str) -> Callable[[Any, Budget], TrainingRun]:
    def build(base: Any, budget: Budget) -> TrainingRun:
        chosen_by_gradient = indices == "gradient"
        config = spiel_config(budget, growth=growth if chosen_by_gradient else "none", regrow_every=_NEVER)
        model = get_peft_model(base, config)
        if indices == "profile":
            place_deltas(model, ProfileSampler.measured())
        return TrainingRun(model, make_optimizer(model), FIRST_CLOSE + 1 if chosen_by_gradient else 2)

    return build


def place_deltas(model: nn.Module, sampler: ProfileSampler) -> None:
    """Move the deltas of a model that was not trained yet to positions drawn from profiles."""
    deltas = [module for module in model.modules() if isinstance(module, SparseDelta)]
    for number, delta in enumerate(deltas):
        drawn = sampler.draw(delta.module_name, delta.rows, delta.cols, delta.k, number, delta.indices.device)
        delta.indices.copy_(drawn)


_MOMENTUM = "SpIEL-MA, SM3"
VARIANTS: dict[str, Callable[[Any, Budget], TrainingRun]] = {
    "lower bound": _lower_bound,
    "LoRA": _lora(0.0),
    "LoRA, dropout 0.05": _lora(0.05),
    "SpIEL-AG": _spiel("accumulated_gradient", _adamw, "gradient"),
    "SpIEL-AG, profile indices": _spiel("accumulated_gradient", _adamw, "profile"),
    "SpIEL-AG, uniform indices": _spiel("accumulated_gradient", _adamw, "uniform"),
    _MOMENTUM: _spiel("momentum", _sm3, "gradient"),
    f"{_MOMENTUM}, profile indices": _spiel("momentum", _sm3, "profile"),
    f"{_MOMENTUM}, uniform indices": _spiel("momentum", _sm3, "uniform"),
    "dense formula": _dense,
    "full fine-tuning": _full,
}


# Growth criterion of the variants that `cycling_run` sets up.
GROWTH = {"SpIEL-AG": "accumulated_gradient", _MOMENTUM: "momentum"}


def build(name: str, base: Any, budget: Budget) -> TrainingRun:
    """Set up a variant on a base model, in place.

    Raises:
        ValueError: no variant has this name.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant must be one of {' | '.join(VARIANTS)}, got {name!r}")
    return VARIANTS[name](base, budget)


def cycling_run(growth: str, base: Any, budget: Budget, **settings: Any) -> TrainingRun:
    """Set up SpIEL with its default cycle, but for `settings` of the config, to measure windows and closes."""
    model = get_peft_model(base, spiel_config(budget, growth=growth, **settings))
    return TrainingRun(model, _sm3(model) if growth == "momentum" else _adamw(model), FIRST_CLOSE)


class DenseLinear(nn.Module):
    """Computes y = x (W + scatter(indices, values))^T as a plain autograd expression, with all its dense copies.

    A 4-bit W is dequantized in every forward pass.
    """

    def __init__(self, layer: SpIELLayer) -> None:
        super().__init__()
        self.base = layer.get_base_layer()
        (delta,) = layer.spiel_delta.values()
        self.register_buffer("indices", delta.indices.to(torch.int64))
        self.values = nn.Parameter(torch.zeros_like(delta.values, dtype=torch.float32))

    def _weight(self) -> Tensor:
        state = getattr(self.base.weight, "quant_state", None)
        if state is None:
            return self.base.weight
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.base.weight.data, state)

    def forward(self, x: Tensor) -> Tensor:
        weight = self._weight()
        values = self.values.to(weight.dtype)
        adapted = weight.flatten().scatter_add(0, self.indices, values).view_as(weight)
        return nn.functional.linear(x, adapted, self.base.bias)


def use_dense_formula(model: nn.Module) -> Any:
    """Replace every SpIEL layer of a model by a `DenseLinear` on the same positions, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SpIELLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, DenseLinear(layer))
    return model
