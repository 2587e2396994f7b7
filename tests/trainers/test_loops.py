"""Loops of one's own: plain PyTorch, Accelerate, Lightning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from adapters.helpers import tiny_llama
from cycle.helpers import assert_same_run, log_of, trainable
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .helpers import Watch, adapted, assert_reloads, config, sentences


def batches(epochs: int = 3, size: int = 8) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.tensor(sentences()).split(size)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=0.02)


def test_plain_loop(tmp_path: Path) -> None:
    model = adapted(total_steps=12)
    watch, optimizer = Watch(model), optimizer_of(model)
    model.train()
    for ids in batches():
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.check([2, 6, 10], 12)
    model.save_pretrained(tmp_path)
    assert_reloads(model, tmp_path)


def test_plain_loop_whose_length_nobody_knows() -> None:
    """The share of replaced deltas follows the learning rate."""
    model = adapted()
    watch, optimizer = Watch(model), optimizer_of(model)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)
    model.train()
    for ids in batches():
        loss_of(model, ids).backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    watch.check([2, 6, 10], None)
    assert [r.rate for r in log_of(model)] == pytest.approx([1.0, *(0.2 * (1 - 0.9 * step / 12) for step in (5, 9))])


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_accelerate_loop(micro_batches: int, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), config(total_steps=12))
    watch = Watch(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    optimizer = optimizer_of(model)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)
    loader = DataLoader(torch.tensor(sentences()), batch_size=8 // micro_batches)
    wrapped, stepper, loader, decay = accelerator.prepare(model, optimizer, loader, decay)
    wrapped.train()
    for _ in range(3):
        for ids in loader:
            with accelerator.accumulate(wrapped):
                accelerator.backward(loss_of(wrapped, ids))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                stepper.step()
                decay.step()
                stepper.zero_grad()
    watch.check([2, 6, 10], 12)
    accelerator.unwrap_model(wrapped).save_pretrained(tmp_path)
    assert_reloads(model, tmp_path)


class Module(lightning.LightningModule):
    """What a Lightning user wraps around any model."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, ids: Tensor, number: int) -> Tensor:
        return loss_of(self.model, ids)

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self.model)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


class ByHand(Module):
    """The same with manual optimization."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__(model)
        self.automatic_optimization = False

    def training_step(self, ids: Tensor, number: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(loss_of(self.model, ids))
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()
        self.lr_schedulers().step()
        optimizer.zero_grad()


def lightning_trainer(folder: Path, **settings: Any) -> lightning.Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(default_root_dir=folder, **{**quiet, **settings})


def fit(model: PeftModel, folder: Path, size: int = 8, module: type[Module] = Module, **settings: Any) -> None:
    with warnings.catch_warnings():
        # About the number of data loading processes, and about the log that is off.
        warnings.simplefilter("ignore")
        loader = DataLoader(torch.tensor(sentences()), batch_size=size)
        lightning_trainer(folder, **settings).fit(module(model), loader)


LENGTHS: dict[str, dict[str, Any]] = {
    "epochs": {"max_epochs": 3},
    "steps": {"max_steps": 12, "max_epochs": -1},
    "accumulation": {"max_epochs": 3, "accumulate_grad_batches": 2, "size": 4},
}


@pytest.mark.parametrize("length", LENGTHS)
def test_lightning(length: str, tmp_path: Path) -> None:
    """Its optimizers run forward and backward in a closure, inside the step; its trainer tells the length."""
    model = adapted()
    watch = Watch(model)
    fit(model, tmp_path, gradient_clip_val=1.0, **LENGTHS[length])
    watch.check([2, 6, 10], 12)
    model.save_pretrained(tmp_path)
    assert_reloads(model, tmp_path)


def test_lightning_by_hand_equals_lightning(tmp_path: Path) -> None:
    models = []
    for module, settings in ((Module, {"gradient_clip_val": 1.0}), (ByHand, {})):
        models.append(adapted(total_steps=12))
        fit(models[-1], tmp_path, module=module, max_epochs=3, **settings)
    assert [report.step for report in log_of(models[0])] == [2, 6, 10]
    assert_same_run(*models)


def test_the_loops_are_one(tmp_path: Path) -> None:
    """Same data, same optimizer: the same run in a plain loop and under Lightning."""
    plain, under_lightning = adapted(total_steps=12), adapted(total_steps=12)
    optimizer = optimizer_of(plain)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)
    plain.train()
    for ids in batches():
        loss_of(plain, ids).backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    fit(under_lightning, tmp_path, max_epochs=3)
    assert_same_run(plain, under_lightning)
