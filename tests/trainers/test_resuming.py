"""A training resumed from one of Trainer's checkpoints equals one that was not interrupted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import PeftModel
from support.adapters import deltas_of, indices_of, log_of
from support.models import tiny_llama
from support.runs import assert_same_run, moved

from spiel_peft import SpIELCallback

from .helpers import adapted
from .test_trainer import trainer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, PeftModel]]:
    """A training of 12 steps with a checkpoint after each, and its end."""
    folder = tmp_path_factory.mktemp("run")
    model = adapted()
    trainer(model, folder, save_strategy="steps", save_steps=1).train()
    yield folder, model
    shutil.rmtree(folder)


# Windows: steps 1-2, 5-6, 9-10. Checkpoints in one, at a close and between them.
@pytest.mark.parametrize("step", [1, 2, 3, 5, 6, 9])
def test_resumed_equals_uninterrupted(checkpoints: tuple[Path, PeftModel], tmp_path: Path, step: int) -> None:
    """Resumed with the callback, the whole run without it."""
    folder, whole = checkpoints
    model = adapted()
    trainer(model, tmp_path, [SpIELCallback()]).train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert_same_run(model, whole)
    assert [report.step for report in log_of(model)] == [close for close in (2, 6, 10) if close > step]


def test_resuming_in_the_same_process_with_the_same_model(checkpoints: tuple[Path, PeftModel], tmp_path: Path) -> None:
    """The loaded state counts, not the model's training before it."""
    folder, whole = checkpoints
    model = adapted()
    trainer(model, tmp_path, max_steps=7, seed=3).train()
    trainer(model, tmp_path).train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert_same_run(model, whole)


def test_a_checkpoint_in_a_window_holds_it(checkpoints: tuple[Path, PeftModel]) -> None:
    folder, _ = checkpoints
    for step, steps_in_window in [(1, 1), (2, 0), (3, 0), (5, 1)]:
        loaded = PeftModel.from_pretrained(tiny_llama(), folder / f"checkpoint-{step}", is_trainable=True)
        for delta in deltas_of(loaded).values():
            assert delta.state.step == step
            assert (delta.state.window.steps if delta.state.window else 0) == steps_in_window


def test_a_checkpoint_trained_further_begins_a_new_run(checkpoints: tuple[Path, PeftModel], tmp_path: Path) -> None:
    """Loaded without resuming: steps count from 1, and the deltas are kept but for the schedule's share."""
    for callbacks in ([], [SpIELCallback()]):
        model = PeftModel.from_pretrained(tiny_llama(), checkpoints[0] / "checkpoint-12", is_trainable=True)
        before = indices_of(model)
        trainer(model, tmp_path, callbacks, max_steps=3).train()
        (report,) = log_of(model)
        assert (report.step, report.rate) == (2, pytest.approx(0.2 * (1 - 2 / 3)))
        for name, delta in deltas_of(model).items():
            assert moved(before[name], delta.indices) <= int(report.rate * delta.k)
