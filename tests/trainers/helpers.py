"""Trainings of the tiny language model, and checks that every one of them must pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support import trainer_runs
from support.adapters import deltas_of, indices_of, log_of, trainable
from support.models import tiny_llama
from support.runs import assert_sound, moved
from support.text import sentences
from torch import Tensor, nn

from spiel_peft import SpIELConfig

TARGETS = ["q_proj", "v_proj", "down_proj"]
# What a run under a trainer has in common here; closes at 2, 6, 10, ...
CYCLE: dict[str, Any] = {"regrow_every": 4, "accumulation_steps": 2}


def config(**fields: Any) -> SpIELConfig:
    settings: dict[str, Any] = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": TARGETS, **CYCLE}
    return SpIELConfig(**{**settings, **fields})


def adapted(base: nn.Module | None = None, **fields: Any) -> PeftModel:
    return get_peft_model(tiny_llama() if base is None else base, config(**fields))


# Twelve steps at a learning rate at which the tiny language model learns.
arguments = partial(trainer_runs.arguments, learning_rate=0.02)


def batches(epochs: int = 3, size: int = 8) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.tensor(sentences()).split(size)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=0.02)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor(sentences(4))).logits


def evaluate(model: nn.Module) -> float:
    ids = torch.tensor(sentences())
    with torch.no_grad():
        return model.eval()(ids, labels=ids).loss.item()


class Watch:
    """Checks a training: positions move, k stays, the loss falls, base weights do not change."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], float] = evaluate) -> None:
        self.model, self.loss = model, loss
        self.indices, self.before = indices_of(model), loss(model)
        self.base = {name: p.detach().clone() for name, p in self._frozen()}

    def _frozen(self) -> list[tuple[str, Tensor]]:
        # Reference adapters are frozen too, and may be added later.
        return [(n, p) for n, p in self.model.named_parameters() if not p.requires_grad and ".spiel_delta." not in n]

    def check(self, closes: list[int], total: int | None, margin: float = 0.02, fresh: bool = True) -> None:
        """Compare with the state before the run.

        Args:
            closes: steps after which cycles have closed.
            total: optimizer steps that the linear schedule went by; None if the learning rate's course decided.
            margin: by how much the loss must have fallen.
            fresh: whether the deltas were new, so that the first close replaced their random positions.
        """
        for name, delta in deltas_of(self.model).items():
            assert_sound(delta, self.indices[name].numel())
            assert delta.values.dtype == torch.float32
            assert moved(self.indices[name], delta.indices)
        log = log_of(self.model)
        assert [report.step for report in log] == closes
        assert sum(report.replaced for report in log[fresh:]) > 0
        if total is not None:
            rates = [0.2 * (1 - step / total) for step in closes]
            assert [r.rate for r in log] == pytest.approx([1.0, *rates[1:]] if fresh else rates)
        assert self.loss(self.model) < self.before - margin
        frozen = dict(self._frozen())
        assert frozen.keys() == self.base.keys()
        for name, tensor in frozen.items():
            assert torch.equal(tensor, self.base[name]), name


def assert_reloads(
    model: nn.Module,
    folder: Path,
    base: Callable[[], nn.Module] = tiny_llama,
    outputs: Callable[[nn.Module], Tensor] = outputs,
) -> None:
    """The adapter saved in `folder` gives a new base model the outputs of the trained model."""
    again = PeftModel.from_pretrained(base(), folder)
    assert torch.equal(outputs(model), outputs(again))
    with again.disable_adapter():
        assert not torch.equal(outputs(model), outputs(again))
