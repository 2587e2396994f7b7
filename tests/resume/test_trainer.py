"""Hugging Face's Trainer: resuming, best checkpoints, longer trainings, checkpoints without an optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import deltas_of, first_delta, log_of
from support.models import tiny_llama
from support.runs import assert_same, everything
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from spiel_peft import SpIELCallback

from .helpers import STEPS
from .llama import adapted_llama, config, llama_trainer


def end_of(trainer: Trainer) -> dict[str, Tensor]:
    return everything(trainer.model, trainer.optimizer)


def closes(model: nn.Module) -> list[int]:
    return [report.step for report in log_of(model)]


def rates(model: nn.Module) -> list[float]:
    return [report.rate for report in log_of(model)]


def checkpoint(folder: Path, step: int) -> str:
    return str(folder / f"checkpoint-{step}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of `STEPS` steps with a checkpoint after each second, and its end."""
    folder = tmp_path_factory.mktemp("run")
    trainer = llama_trainer(folder, save_strategy="steps", save_steps=2)
    trainer.train()
    assert closes(trainer.model) == [3, 8, 13]
    torch.save(end_of(trainer), folder / "end.pt")
    return folder


def whole(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "end.pt", weights_only=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"optim": "adamw_bnb_8bit"},
        {"optim": "sgd", "optim_args": "momentum=0.9", "growth": "momentum"},
    ],
    ids=str,
)
def test_resume(tmp_path: Path, settings: dict[str, Any]) -> None:
    """A run resumed from inside a window is the same, optimizer state included."""
    trainer = llama_trainer(tmp_path, save_strategy="steps", save_steps=1, **settings)
    trainer.train()
    for step in (2, 4, 7):
        again = llama_trainer(tmp_path / "again", **settings)
        again.train(resume_from_checkpoint=checkpoint(tmp_path, step))
        assert_same(end_of(again), end_of(trainer))


def test_an_adapter_that_transformers_loads_resumes_by_the_optimizer(folder: Path) -> None:
    """transformers' `load_adapter` does not load training state; the optimizer's file restores it."""
    for step in (4, 6):
        model = tiny_llama()
        model.load_adapter(checkpoint(folder, step), is_trainable=True)
        model.train()
        assert first_delta(model).state.step == 0
        trainer = llama_trainer(folder / "again", model=model)
        trainer.create_optimizer_and_scheduler(STEPS)
        for part, file in ((trainer.optimizer, "optimizer"), (trainer.lr_scheduler, "scheduler")):
            part.load_state_dict(torch.load(folder / f"checkpoint-{step}" / f"{file}.pt", weights_only=True))
        loader = list(trainer.get_train_dataloader())  # the order of the first epoch, as the checkpoint's trainer had
        for batch in loader[step:8]:
            train_one_step(trainer, batch)
        other = torch.load(folder / "checkpoint-8" / "optimizer.pt", weights_only=True)
        found = trainer.optimizer.state_dict()
        assert [str(group) for group in found["param_groups"]] == [str(group) for group in other["param_groups"]]
        for number, state in other["state"].items():
            assert all(torch.equal(state[name], found["state"][number][name]) for name in state)


def train_one_step(trainer: Trainer, batch: dict[str, Tensor]) -> None:
    trainer.model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    trainer.model.zero_grad()


@pytest.mark.parametrize("callbacks", [[], [SpIELCallback()]], ids=["plain", "callback"])
@pytest.mark.parametrize("stop", [6, 9])
def test_a_longer_training_goes_on_by_the_new_length(tmp_path: Path, stop: int, callbacks: list[Any]) -> None:
    """A training is resumed with more steps, from its end and from its middle: steps count on, and the rate follows."""
    llama_trainer(tmp_path, max_steps=9, save_strategy="steps", save_steps=3).train()
    trainer = llama_trainer(tmp_path / "longer", max_steps=20, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=checkpoint(tmp_path, stop))
    assert closes(trainer.model) == [step for step in (8, 13, 18) if step > stop]
    assert rates(trainer.model) == pytest.approx([0.2 * (1 - step / 20) for step in closes(trainer.model)])
    assert first_delta(trainer.model).state.step == 20


def test_resuming_a_finished_training_changes_nothing(folder: Path, tmp_path: Path) -> None:
    trainer = llama_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=checkpoint(folder, STEPS))
    assert closes(trainer.model) == []
    after = {name: tensor for name, tensor in whole(folder).items() if "state." not in name}
    assert_same({name: tensor for name, tensor in end_of(trainer).items() if "state." not in name}, after)


def test_a_second_train_after_resuming_begins_a_new_run(folder: Path, tmp_path: Path) -> None:
    trainer = llama_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=checkpoint(folder, 10))
    assert_same(end_of(trainer), whole(folder))
    trainer.args.max_steps = 9
    trainer.train()
    assert closes(trainer.model) == [13, 3, 8]
    assert rates(trainer.model)[1:] == pytest.approx([0.2 * (1 - 3 / 9), 0.2 * (1 - 8 / 9)])


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_a_second_train_after_an_early_stop_begins_a_new_run(tmp_path: Path) -> None:
    trainer = llama_trainer(tmp_path, callbacks=[StopAt(6)])
    trainer.train()
    trainer.train()
    assert closes(trainer.model) == [3, 3]
    assert first_delta(trainer.model).state.step == 6


def test_train_again_from_a_checkpoint_of_the_same_trainer(tmp_path: Path) -> None:
    """The same optimizer, which has stepped already, is loaded with its earlier state."""
    trainer = llama_trainer(tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    end = end_of(trainer)
    trainer.train(resume_from_checkpoint=checkpoint(tmp_path, 4))
    assert_same(end_of(trainer), end)


def test_a_checkpoint_without_optimizer_goes_on_with_the_cycle(tmp_path: Path) -> None:
    """With `save_only_model`, step count and window are restored; moments and learning rates start anew."""
    first = llama_trainer(tmp_path, save_strategy="steps", save_steps=4, save_only_model=True)
    first.train()
    assert not (tmp_path / "checkpoint-4" / "optimizer.pt").exists()
    trainer = llama_trainer(tmp_path / "again")
    trainer.train(resume_from_checkpoint=checkpoint(tmp_path, 4))
    assert closes(trainer.model) == [8, 13]
    assert rates(trainer.model) == pytest.approx([0.2 * (1 - step / STEPS) for step in (8, 13)])
    assert first_delta(trainer.model).state.step == STEPS
    assert all(int(trainer.optimizer.state[d.values]["step"]) == STEPS - 4 for d in deltas_of(trainer.model).values())


class Losses(Trainer):
    """Reports that the model was best after step 6."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_loss": abs(self.state.global_step - 6.0)}
        self.log(metrics)
        return metrics


def test_the_best_model_at_the_end(tmp_path: Path) -> None:
    """The best model is loaded with its indices; the optimizer's state belongs to later indices and is not used."""
    every_second = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = llama_trainer(tmp_path, kind=Losses, load_best_model_at_end=True, **every_second)
    trainer.train()
    assert trainer.state.best_model_checkpoint == checkpoint(tmp_path, 6)
    best = llama_trainer(tmp_path / "best", model=adapted_llama()).model
    best.load_adapter(checkpoint(tmp_path, 6), "default")
    for name, delta in deltas_of(trainer.model).items():
        assert torch.equal(delta.indices, deltas_of(best)[name].indices)
        assert torch.equal(delta.values, deltas_of(best)[name].values)
        assert delta.state.step == 6
    before = {name: trainer.optimizer.state[d.values]["exp_avg"] for name, d in deltas_of(trainer.model).items()}
    trainer.args.max_steps = 4
    trainer.args.load_best_model_at_end = False
    trainer.train()
    assert closes(trainer.model) == [3, 8, 13, 3]
    for name, delta in deltas_of(trainer.model).items():
        assert int(trainer.optimizer.state[delta.values]["step"]) == 4
        assert trainer.optimizer.state[delta.values]["exp_avg"] is not before[name]


def test_other_settings_of_the_cycle_are_reported(folder: Path, tmp_path: Path) -> None:
    """New cycle settings take effect at once: closes are at 3, 10, 17, ..., so no window is open at step 6."""
    model = adapted_llama(regrow_every=7)
    trainer = llama_trainer(tmp_path, model=model, max_steps=11)
    with pytest.warns(UserWarning, match=r"resumed with regrow_every=7, accumulation_steps=3; its .* 5 and 3"):
        trainer.train(resume_from_checkpoint=checkpoint(folder, 6))
    assert closes(model) == [10]
    assert all(delta.state.window is None for delta in deltas_of(model).values())


@pytest.mark.parametrize("length", [{"max_steps": -1, "num_train_epochs": 0}, {"max_steps": 1}], ids=str)
def test_hardly_any_step(tmp_path: Path, length: dict[str, int], recwarn: pytest.WarningsRecorder) -> None:
    """After no step, nothing is changed or saved; after one, there is no close and a warning."""
    trainer = llama_trainer(tmp_path, **length)
    before = {name: delta.indices.clone() for name, delta in deltas_of(trainer.model).items()}
    trainer.train()
    trained = "max_steps=1" if length["max_steps"] == 1 else ""
    assert closes(trainer.model) == []
    assert all(torch.equal(delta.indices, before[name]) for name, delta in deltas_of(trainer.model).items())
    told = [str(w.message) for w in recwarn if "ends before its first cycle closes" in str(w.message)]
    assert len(told) == bool(trained)
    trainer.save_model(str(tmp_path))
    loaded = adapted_llama()
    loaded.load_adapter(tmp_path, "default", is_trainable=True)
    assert first_delta(loaded).state.step == bool(trained)


def test_total_steps_of_zero() -> None:
    with pytest.raises(ValueError, match="`total_steps` must be an integer of at least 1, got 0"):
        config(total_steps=0)
