"""`SpIELCallback`: exact run length, one log entry per close, and no other change to a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.adapters import deltas_of, first_delta, log_of
from support.models import mlp
from support.runs import adamw, adapt, assert_same_run
from support.trainer_runs import Regression, arguments, regression, total_deltas, trainer
from transformers import TrainerCallback

from spiel_peft import SpIELCallback, SpIELOptimizer

KEYS = {"spiel/rate", "spiel/replaced", "spiel/kept", "spiel/churn", "spiel/mean_abs_delta"}


def entries(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in history if KEYS & entry.keys()]


class Recorder(TrainerCallback):
    """A callback in the place of reporters (TensorBoard, W&B): before the user's callbacks."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 3, "optim": "sgd"}])
def test_three_ways_are_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    models = [regression(total_steps=12) for _ in range(4)]
    trainer(models[0], tmp_path, **settings).train()
    trainer(models[1], tmp_path, [SpIELCallback()], **settings).train()
    wrapping = trainer(models[2], tmp_path, **settings)
    wrapping.optimizer = SpIELOptimizer(wrapping.create_optimizer(), models[2])
    wrapping.train()
    both = trainer(models[3], tmp_path, [SpIELCallback(), SpIELCallback()], **settings)
    both.optimizer = SpIELOptimizer(both.create_optimizer(), models[3])
    both.train()
    for model in models:
        assert [report.step for report in log_of(model)] == [2, 6, 10]
        assert_same_run(model, models[0])
    assert sum(report.replaced for report in log_of(models[0])[1:]) > 0


def test_the_ways_are_one_when_the_trainer_tells_the_length(tmp_path: Path) -> None:
    models = [regression(), regression(), regression(total_steps=12)]
    trainer(models[0], tmp_path).train()
    trainer(models[1], tmp_path, [SpIELCallback()]).train()
    trainer(models[2], tmp_path).train()
    assert_same_run(models[0], models[2])
    assert_same_run(models[1], models[2])


def test_logs_every_close_once(tmp_path: Path) -> None:
    model = regression()
    recorder = Recorder()
    training = trainer(model, tmp_path, [recorder, SpIELCallback()])
    training.train()
    history = training.state.log_history
    found = entries(history)
    assert [entry["step"] for entry in found] == [2, 6, 10]
    for entry, report in zip(found, log_of(model), strict=True):
        assert entry.keys() == KEYS | {"epoch", "step"}
        assert entry["step"] == report.step
        assert entry["spiel/rate"] == report.rate
        assert entry["spiel/replaced"] == report.replaced
        assert entry["spiel/kept"] == report.kept == total_deltas(model) - report.replaced
        assert entry["spiel/churn"] == report.churn
        assert entry["spiel/mean_abs_delta"] == report.mean_abs_delta > 0
    # Reporters see them too, whatever their place in the list of callbacks.
    assert [log["spiel/replaced"] for log in entries(recorder.logs)] == [r.replaced for r in log_of(model)]


def test_the_trainers_own_log_is_not_disturbed(tmp_path: Path) -> None:
    """The same entries with the same averaged losses as without the callback, at the same steps."""
    histories = []
    for callbacks in ([], [SpIELCallback()]):
        training = trainer(regression(), tmp_path, callbacks)
        training.train()
        own = [entry for entry in training.state.log_history if not KEYS & entry.keys()]
        histories.append(
            [{k: v for k, v in entry.items() if "runtime" not in k and "second" not in k} for entry in own]
        )
    assert histories[0] == histories[1]
    assert [entry["step"] for entry in histories[0]] == [5, 10, 12]


def test_own_metrics_of_a_subclass_stay_with_its_own_entries(tmp_path: Path) -> None:
    """TRL's trainers add their metrics to every log entry and clear them; entries of closes must not get them."""
    training = trainer(regression(), tmp_path, [SpIELCallback()])

    class Gathering(type(training)):  # type: ignore[misc]
        def log(self, logs: dict[str, float], *rest: Any) -> None:
            super().log({**logs, "gathered": 1.0}, *rest)

    training.__class__ = Gathering
    training.train()
    assert all("gathered" not in entry for entry in entries(training.state.log_history))
    assert any("gathered" in entry for entry in training.state.log_history)


def test_a_second_train_is_a_second_run(tmp_path: Path) -> None:
    """In a second run steps count anew, deltas are not fresh, and closes are logged once, with and without callback."""
    models = [regression(), regression()]
    for model, callbacks in zip(models, ([], [SpIELCallback()]), strict=True):
        training = trainer(model, tmp_path, callbacks)
        training.train()
        optimizer = training.optimizer.optimizer
        training.train()
        assert training.optimizer.optimizer is optimizer
        assert [report.step for report in log_of(model)] == [2, 6, 10] * 2
        assert [report.rate for report in log_of(model)[:1] + log_of(model)[3:4]] == [
            1.0,
            pytest.approx(0.2 * (1 - 2 / 12)),
        ]
    assert [entry["step"] for entry in entries(training.state.log_history)] == [2, 6, 10]
    assert_same_run(*models)


def test_a_second_trainer_of_another_length(tmp_path: Path) -> None:
    for callbacks in ([], [SpIELCallback()]):
        model = regression()
        trainer(model, tmp_path, callbacks).train()
        trainer(model, tmp_path, callbacks, max_steps=14).train()
        rates = [report.rate for report in log_of(model)[3:]]
        assert rates == pytest.approx([0.2 * (1 - step / 14) for step in range(2, 15, 4)])


def test_a_second_train_of_another_length(tmp_path: Path) -> None:
    """The same trainer and optimizer, told to train longer."""
    for callbacks in ([], [SpIELCallback()]):
        model = regression()
        training = trainer(model, tmp_path, callbacks)
        training.train()
        training.args.max_steps = 14
        training.train()
        rates = [report.rate for report in log_of(model)[3:]]
        assert rates == pytest.approx([0.2 * (1 - step / 14) for step in range(2, 15, 4)])


def test_total_steps(tmp_path: Path) -> None:
    """The callback's total_steps comes first, then the config's, then the trainer's."""
    for told, config, expected in [(24, 48, 24), (None, 48, 48), (None, None, 12), (24, None, 24)]:
        model = regression(total_steps=config)
        trainer(model, tmp_path, [SpIELCallback(total_steps=told)]).train()
        assert log_of(model)[1].rate == pytest.approx(0.2 * (1 - 6 / expected))


@pytest.mark.parametrize("total_steps", [0, -1, True, 1.5, "7"])
def test_wrong_total_steps(total_steps: Any) -> None:
    with pytest.raises(ValueError, match="total_steps must be a positive int .* got"):
        SpIELCallback(total_steps=total_steps)


def test_a_model_without_deltas_is_refused(tmp_path: Path) -> None:
    training = trainer(Regression(), tmp_path, [SpIELCallback()])
    with pytest.raises(ValueError, match="holds none of the model's SpIEL values"):
        training.train()


def test_an_optimizer_without_the_deltas_is_refused(tmp_path: Path) -> None:
    model, other = regression(), adapt(mlp())
    training = trainer(model, tmp_path, [SpIELCallback()], adamw(other))
    with pytest.raises(ValueError, match="holds none of the model's SpIEL values"):
        training.train()


def test_outside_a_trainer_the_log_goes_to_the_state(tmp_path: Path) -> None:
    """A custom loop may call the callback's events."""
    model = regression()
    training = trainer(model, tmp_path)
    training.train()
    callback, state = SpIELCallback(), training.state
    args, control = arguments(tmp_path), training.control
    callback.on_train_begin(args, state, control, model=model, optimizer=training.optimizer)
    run = first_delta(model).run
    before = len(state.log_history)
    run.log.append(run.log[-1])
    callback.on_step_end(args, state, control)
    callback.on_step_end(args, state, control)
    assert len(state.log_history) == before + 1
    assert KEYS < state.log_history[-1].keys()


def test_deltas_stay_in_their_precision(tmp_path: Path) -> None:
    """A cast of the whole model before training is undone for the deltas."""
    model = regression()
    for delta in deltas_of(model).values():
        delta.values.data = delta.values.data.bfloat16()
    trainer(model, tmp_path, [SpIELCallback()]).train()
    assert {str(delta.values.dtype) for delta in deltas_of(model).values()} == {"torch.float32"}
