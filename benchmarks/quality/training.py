"""The one training loop of all methods: AdamW, a short warm-up, linear decay, gradients clipped to norm 1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

from .tasks import Batch, Task

WARMUP = 0.03  # of the steps
MAX_NORM = 1.0


@dataclass
class Setup:
    """A model ready to be trained.

    Attributes:
        model: what the forward pass goes through.
        trained: the parameters that the method trains, by name.
        head: those of a new classifier, which every method trains besides.
        after_step: called after every optimizer step.
    """

    model: Any
    trained: dict[str, nn.Parameter]
    head: dict[str, nn.Parameter] = field(default_factory=dict)
    after_step: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None

    @property
    def values(self) -> int:
        """How many values the method trains, the classifier's left out."""
        return sum(p.numel() for p in self.trained.values())


class DivergedError(Exception):
    """The training loss is no longer finite.

    Attributes:
        step: the step, counted from 1, whose loss it was.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss of step {step} is not finite")
        self.step = step


def train(
    setup: Setup,
    task: Task,
    *,
    seed: int,
    steps: int,
    rate: float,
    decay: float = 0.0,
    micro_batches: int = 1,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train the model of a setup.

    Args:
        seed: of the order of the batches.
        steps: optimizer steps.
        rate: the highest learning rate.
        decay: AdamW's weight decay of what the method trains; a classifier's is 0.
        micro_batches: backward passes that a step's batch is cut into.
        on_step: called after each step with its number, from 1, and its loss.

    Raises:
        DivergedError: a loss was not finite; the model is left as it was before that step.
    """
    groups = [{"params": list(setup.trained.values()), "weight_decay": decay}]
    if setup.head:
        groups.append({"params": list(setup.head.values()), "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=rate)
    scheduler = get_linear_schedule_with_warmup(optimizer, math.ceil(WARMUP * steps), steps)
    parameters = [parameter for group in groups for parameter in group["params"]]
    for step, batch in enumerate(itertools.islice(task.batches(seed), steps), start=1):
        total = 0.0
        for part in _parts(batch, micro_batches):
            loss = task.loss(setup.model, part) / micro_batches
            total += float(loss.detach())
            if not math.isfinite(total):
                raise DivergedError(step)
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        setup.after_step(optimizer)
        scheduler.step()
        optimizer.zero_grad()
        on_step(step, total)


def _parts(batch: Batch, count: int) -> list[Batch]:
    rows = len(batch["labels"])
    if rows % count:
        raise ValueError(f"a batch of {rows} rows cannot be cut into {count} equal parts")
    size = rows // count
    return [{key: value[start : start + size] for key, value in batch.items()} for start in range(0, rows, size)]
