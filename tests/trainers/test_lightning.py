"""Lightning: a LightningModule around a PeftModel, with nothing but the config swapped."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from peft import PeftModel
from support.adapters import deltas_of, log_of
from support.runs import assert_same_run
from support.text import sentences
from torch import Tensor
from torch.utils.data import DataLoader

from .helpers import Watch, adapted, assert_reloads, batches, loss_of, optimizer_of


def decay_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)


class Module(lightning.LightningModule):
    """A LightningModule as users write it."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, ids: Tensor, number: int) -> Tensor:
        return loss_of(self.model, ids)

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self.model)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay_of(optimizer), "interval": "step"}}


class ByHand(Module):
    """A LightningModule with manual optimization."""

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


def fit(
    model: PeftModel,
    folder: Path,
    size: int = 8,
    module: type[Module] = Module,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> lightning.Trainer:
    trainer = lightning_trainer(folder, **settings)
    with warnings.catch_warnings():
        # About the number of data loading processes, and about the log that is off.
        warnings.simplefilter("ignore")
        trainer.fit(module(model), DataLoader(torch.tensor(sentences()), batch_size=size), ckpt_path=ckpt_path)
    return trainer


LENGTHS: dict[str, dict[str, Any]] = {
    "epochs": {"max_epochs": 3},
    "steps": {"max_steps": 12, "max_epochs": -1},
    "accumulation": {"max_epochs": 3, "accumulate_grad_batches": 2, "size": 4},
}


@pytest.mark.parametrize("length", LENGTHS)
def test_lightning(length: str, tmp_path: Path) -> None:
    """Lightning runs forward and backward passes in a closure inside the step; its trainer knows the run's length."""
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
    decay = decay_of(optimizer)
    plain.train()
    for ids in batches():
        loss_of(plain, ids).backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    fit(under_lightning, tmp_path, max_epochs=3)
    assert_same_run(plain, under_lightning)


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (ByHand, {"max_epochs": 3}),
        (Module, {"max_epochs": 3, "callbacks": [GradientAccumulationScheduler({1: 1})]}),
        (Module, {"max_time": {"hours": 1}, "max_epochs": -1, "callbacks": "stop"}),
    ],
    ids=["manual optimization", "changing accumulation", "a time limit"],
)
def test_where_its_estimate_is_none_of_steps(module: type[Module], settings: dict[str, Any], tmp_path: Path) -> None:
    """The share of replaced deltas follows the learning rate then."""

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 12

    if settings.get("callbacks") == "stop":
        settings = {**settings, "callbacks": [Stop()]}
    model = adapted()
    fit(model, tmp_path, module=module, **settings)
    assert [r.step for r in log_of(model)] == [2, 6, 10]
    assert [r.rate for r in log_of(model)] == pytest.approx([1.0, *(0.2 * (1 - 0.9 * step / 12) for step in (5, 9))])


class DataByStep(Module):
    """Selects data by step, as Lightning starts an epoch's data anew when it resumes."""

    def training_step(self, ids: Tensor, number: int) -> Tensor:
        return super().training_step(list(batches())[self.trainer.global_step], number)


@pytest.mark.parametrize("step", [1, 2, 4, 5, 9])
def test_resumed_equals_uninterrupted(step: int, tmp_path: Path) -> None:
    """From a checkpoint of Lightning's own: before, in and after a window."""
    whole, model = adapted(), adapted()
    settings: dict[str, Any] = {"max_epochs": 3, "module": DataByStep}
    fit(whole, tmp_path, **settings)
    every = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(adapted(), tmp_path, **settings, callbacks=[every], enable_checkpointing=True)
    fit(model, tmp_path, **settings, ckpt_path=tmp_path / "kept" / f"step={step}.ckpt")
    assert [report.step for report in log_of(model)] == [close for close in (2, 6, 10) if close > step]
    assert_same_run(model, whole)


def test_a_second_fit_is_a_second_run(tmp_path: Path) -> None:
    model = adapted()
    fit(model, tmp_path, max_epochs=3)
    fit(model, tmp_path, max_epochs=2)
    assert [r.step for r in log_of(model)] == [2, 6, 10, 2, 6]
    assert [r.rate for r in log_of(model)[3:]] == pytest.approx([0.2 * (1 - step / 8) for step in (2, 6)])
    assert {delta.state.step for delta in deltas_of(model).values()} == {8}
