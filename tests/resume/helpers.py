"""Small training runs that can be saved after any step, resumed in new objects, and compared bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from support.adapters import trainable
from support.runs import adapt, batch, everything
from torch import Tensor, nn

from spiel_peft import SM3, SpIELOptimizer

# Windows: steps 1-3, 6-8 and 11-13, of which every last one closes a cycle.
CYCLE: dict[str, Any] = {"regrow_every": 5, "accumulation_steps": 3, "total_steps": 20, "density": 0.4}
STEPS = 16


def adamw8bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    # Matrices of 16 values and more have 8-bit state; all are small here.
    return bnb.optim.AdamW8bit(parameters, lr=0.01, min_8bit_size=16)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "sgd_plain": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "sm3": lambda parameters: SM3(parameters, lr=0.05, momentum=0.9),
    "adamw_8bit": adamw8bit,
}
GROWTHS = ["accumulated_gradient", "momentum", "random"]


class Run:
    """A model and its optimizer in the middle of a training of `STEPS` optimizer steps.

    Args:
        optimizer: one of `OPTIMIZERS`.
        micro_batches: per optimizer step.
        wrapped: train through `SpIELOptimizer`.
        fields: of the config.
    """

    def __init__(self, optimizer: str = "adamw", micro_batches: int = 1, wrapped: bool = False, **fields: Any) -> None:
        self.settings = {"optimizer": optimizer, "micro_batches": micro_batches, "wrapped": wrapped, **fields}
        self.fields = {**CYCLE, **fields}
        self.make, self.micro_batches, self.wrapped = OPTIMIZERS[optimizer], micro_batches, wrapped
        self.use(adapt(**self.fields))

    def use(self, model: nn.Module) -> None:
        """Continue with this model and a new optimizer."""
        self.model = model.train()
        optimizer = self.make(trainable(model))
        self.optimizer = SpIELOptimizer(optimizer, model) if self.wrapped else optimizer

    def again(self) -> Run:
        """A new run with the same settings, before its first step."""
        return Run(**self.settings)

    def loss(self, step: int, number: int) -> Tensor:
        x, y = batch(100 * step + number)
        return (self.model(x) - y).square().mean()

    def micro_batch(self, step: int, number: int) -> None:
        (self.loss(step, number) / self.micro_batches).backward()

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(trainable(self.model), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, first: int, last: int = STEPS) -> Run:
        """Optimizer steps number `first` to `last`, counted from 1."""
        for step in range(first, last + 1):
            for number in range(self.micro_batches):
                self.micro_batch(step, number)
            self.step()
        return self

    def everything(self) -> dict[str, Tensor]:
        """A copy of the state of the run; see `support.runs.everything`."""
        return everything(self.model, self.optimizer)
