"""Between two optimizer steps, trainers run forward twice, accumulate gradients, or skip a step that overflowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support.adapters import deltas_of, trainable
from support.runs import adamw, adapt, assert_same_run, loss_of, train
from support.text import rows
from torch import nn
from transformers import Trainer, TrainerCallback

from .helpers import adapted, arguments
from .trl_runs import KINDS

REENTRANT = [{"use_reentrant": True}, {"use_reentrant": False}]


class Uses(TrainerCallback):
    """Counts forward passes of an adapted layer, and how often its collector was asked for positions."""

    def __init__(self) -> None:
        self.forwards = self.backwards = 0

    def watch(self, model: nn.Module) -> None:
        layer = next(m for m in model.modules() if hasattr(m, "spiel_delta"))
        layer.register_forward_pre_hook(lambda *_: setattr(self, "forwards", self.forwards + 1))
        collector = layer.spiel_delta["default"].collector
        wanted = collector.wanted

        def counted(*args: Any) -> Any:
            self.backwards += 1
            return wanted(*args)

        collector.wanted = counted


@pytest.mark.parametrize("kwargs", REENTRANT, ids=str)
def test_checkpointing_runs_forward_twice_and_collects_once(kwargs: dict[str, bool], tmp_path: Path) -> None:
    """Trainer's gradient checkpointing of both kinds: the run is the same, to the bit."""
    models, uses = [], []
    for settings in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}):
        model = adapted()
        uses.append(Uses())
        args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=7, **settings)
        training = Trainer(model=model, args=args, train_dataset=rows())
        uses[-1].watch(model)
        training.train()
        models.append(model)
    passes = 14  # two micro-batches a step
    assert [(use.forwards, use.backwards) for use in uses] == [(passes, passes), (2 * passes, passes)]
    assert_same_run(*models)


@pytest.mark.parametrize(("name", "kwargs"), [*zip(["SFT", "DPO"], REENTRANT, strict=True)], ids=str)
def test_checkpointing_under_trl(name: str, kwargs: dict[str, bool], tmp_path: Path) -> None:
    models = []
    for settings in (
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": dict(kwargs)},
    ):
        model = adapted()
        KINDS[name].build(model, tmp_path, max_steps=7, **settings).train()
        models.append(model)
    assert_same_run(*models)


class Overflowing(Trainer):
    """Multiplies the loss by infinity in chosen steps."""

    def __init__(self, at: set[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.at, self.calls = at, 0
        # What fp16=True gives on a GPU; powers of two, so that scaling costs no bits.
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().compute_loss(*args, **kwargs) * (float("inf") if self.calls in self.at else 1.0)


class Hooked:
    """Counts how often an optimizer's own hooks fire."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.count = 0
        optimizer.register_step_post_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1


# Windows of three steps before the closes at 3 and 7: the opening, a middle and the last step of one.
@pytest.mark.parametrize("bad", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("where", ["in the deltas", "elsewhere"])
def test_fused_adamw_under_accelerate_fires_its_hooks_on_overflow_steps_too(bad: int, where: str) -> None:
    """The step is not counted, and its gradients reach no window: the run is one that never had it."""
    settings = {"accumulation_steps": 3, "total_steps": 20, "initial_regrow_rate": 0.8}
    reference, model = adapt(**settings), adapt(**settings)
    train(reference, adamw(reference, fused=True), 8)
    accelerator = Accelerator(cpu=True)
    # What mixed_precision="fp16" gives on a GPU; powers of two, so that scaling costs no bits.
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    head = nn.Parameter(torch.ones(()))
    inner = torch.optim.AdamW([*trainable(model), head], lr=0.01, fused=True)
    wrapped, optimizer = accelerator.prepare(model, inner)
    hooked = Hooked(inner)
    for number in range(1, 9):
        if number == bad:
            loss = loss_of(wrapped, 50)
            accelerator.backward(loss * float("inf") if where == "in the deltas" else loss + 3e38 * head)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.backward(loss_of(wrapped, number) + 0 * head)
        optimizer.step()
        optimizer.zero_grad()
    assert hooked.count == 9
    assert {delta.state.step for delta in deltas_of(model).values()} == {8}
    assert_same_run(model, reference)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_overflow_under_trainer(optim: str, tmp_path: Path) -> None:
    """In the opening step of a run, inside a window and at a close: each shifts the schedule by one step."""
    model = adapted()
    args = arguments(tmp_path, optim=optim, max_grad_norm=0.0)
    Overflowing({1, 4, 7}, model=model, args=args, train_dataset=rows()).train()
    for delta in deltas_of(model).values():
        assert delta.state.step == 9
        assert [report.step for report in delta.run.log] == [2, 6]
        # Step 9 opens the window of the close at 10.
        assert delta.state.window.steps == 1
        assert torch.isfinite(delta.state.window.sums).all() and torch.isfinite(delta.values).all()
