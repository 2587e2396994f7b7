"""Trainings of the small MLP by Hugging Face's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from support.adapters import trainable
from support.models import mlp
from support.runs import adapt, batch

# Settings of every Trainer in the tests: on the CPU, without reports, progress bars and checkpoints.
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
}


class Regression(nn.Module):
    """The small MLP with the inputs and outputs that Trainer expects."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.net(x)
        return {"loss": (out - labels).square().mean(), "logits": out}


def regression(**fields: Any) -> nn.Module:
    """A SpIEL adapter on two layers; closes at 2, 6, 10, ..."""
    return adapt(Regression(), **{"target_modules": ["net.0", "net.2"], **fields})


def rows(count: int = 64) -> list[dict[str, Tensor]]:
    """Training data of `Regression`."""
    x, y = batch(0, size=count)
    return [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Twelve steps of eight rows, unless `settings` say otherwise."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "logging_steps": 5,
        **QUIET,
    }
    return TrainingArguments(**{**defaults, **settings})


def trainer(model: nn.Module, folder: Path, callbacks: Any = None, optimizer: Any = None, **settings: Any) -> Trainer:
    """A Trainer of `Regression`."""
    return Trainer(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=rows(),
        callbacks=callbacks,
        optimizers=(optimizer, None),
    )


def total_deltas(model: nn.Module) -> int:
    """Number of deltas of all adapted modules."""
    return sum(p.numel() for p in trainable(model))
