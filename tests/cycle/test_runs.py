"""When a run begins, which optimizer owns it, and runs with several adapters or optimizers."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.adapters import deltas_of, first_delta, indices_of, log_of, trainable
from support.models import mlp
from support.runs import adamw, adapt, assert_same_run, loss_of, moved, train
from torch import nn

from spiel_peft import SpIELConfig, SpIELOptimizer

SECOND = {"target_modules": ["0", "2"], "density": 0.3, "regrow_every": 3, "accumulation_steps": 1, "total_steps": 30}


def two_adapters() -> PeftModel:
    """Two adapters, both active and trainable, each with its own schedule."""
    model = adapt(total_steps=20)
    model.add_adapter("second", SpIELConfig(seed=7, **SECOND))
    model.base_model.set_adapter(["default", "second"])
    return model.train()


def test_two_trainable_adapters_keep_their_own_schedules() -> None:
    model = two_adapters()
    train(model, adamw(model), 8)
    assert [report.step for report in log_of(model)] == [2, 6]
    assert [report.step for report in log_of(model, "second")] == [1, 4, 7]
    assert [report.rate for report in log_of(model, "second")] == pytest.approx(
        [1.0, 0.2 * (1 - 4 / 30), 0.2 * (1 - 7 / 30)]
    )


def test_inactive_adapters_do_not_advance() -> None:
    model = two_adapters()
    optimizer = adamw(model)
    model.set_adapter("default")
    before = indices_of(model, "second")
    train(model, optimizer, 6)
    for name, delta in deltas_of(model, "second").items():
        assert delta.state.step == 0
        assert torch.equal(delta.indices, before[name])
    assert [report.step for report in log_of(model)] == [2, 6]
    model.set_adapter("second")
    train(model, optimizer, 1)
    assert [report.step for report in log_of(model, "second")] == [1]
    assert first_delta(model).state.step == 6


def test_a_frozen_adapter_beside_a_trainable_one_stays() -> None:
    model = two_adapters()
    for delta in deltas_of(model, "second").values():
        delta.values.requires_grad_(False)
        delta.values.data.normal_(std=0.01)
    before = {name: delta.values.clone() for name, delta in deltas_of(model, "second").items()}
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    train(model, optimizer, 6)
    assert len(log_of(model)) == 2
    assert log_of(model, "second") == []
    for name, delta in deltas_of(model, "second").items():
        assert torch.equal(delta.values, before[name])


def test_other_optimizers_are_ignored() -> None:
    model, alone = adapt(total_steps=20), adapt(total_steps=20)
    other = nn.Linear(3, 3)
    other_optimizer = torch.optim.AdamW(other.parameters())

    def step_other(number: int) -> None:
        other(torch.ones(1, 3)).sum().backward()
        other_optimizer.step()

    train(model, adamw(model), 7, after=step_other)
    train(alone, adamw(alone), 7)
    assert_same_run(model, alone)


def test_two_models_in_one_process_do_not_mix() -> None:
    a, b, alone = adapt(total_steps=20), adapt(total_steps=20, seed=3), adapt(total_steps=20)
    optimizers = adamw(a), adamw(b)
    for number in range(1, 8):
        for model, optimizer in zip((a, b), optimizers, strict=True):
            train(model, optimizer, 1, first=number)
    train(alone, adamw(alone), 7)
    assert_same_run(a, alone)
    assert len(log_of(a)) == len(log_of(b)) == 2


def test_one_adapter_under_two_optimizers() -> None:
    """Two optimizers have half of the layers each: there is one run, and each closes cycles of its own layers."""
    model = adapt(total_steps=20)
    deltas = deltas_of(model)
    optimizers = [torch.optim.SGD([delta.values], lr=0.01) for delta in deltas.values()]
    before = indices_of(model)
    for number in range(1, 3):
        loss_of(model, number).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert [report.rate for report in log_of(model)] == [1.0, 1.0]
    assert all(moved(before[name], delta.indices) for name, delta in deltas.items())


def test_deltas_that_no_optimizer_steps_are_named_once() -> None:
    model = adapt(total_steps=20)
    head = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.warns(UserWarning, match=r"adapter 'default' have been given gradients .* no torch\.optim") as caught:
        for number in range(12):
            loss_of(model, number).backward()
            head.step()
            model.zero_grad()
    assert len([w for w in caught if "have been given gradients" in str(w.message)]) == 1


def test_no_warning_in_ordinary_training_and_evaluation() -> None:
    model = adapt(total_steps=40, growth="momentum")
    optimizer = adamw(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(1, 13):
            for _ in range(3):
                loss_of(model, number).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                loss_of(model.eval(), 0)
            model.train()


def test_a_second_optimizer_begins_a_new_run() -> None:
    """In the new run steps count from 1, deltas are not fresh, and the length of the first run no longer counts."""
    model = adapt()
    train(model, SpIELOptimizer(adamw(model), model, total_steps=20), 3)
    train(model, adamw(model), 6)
    assert [report.step for report in log_of(model)] == [2, 2, 6]
    # Unknown length now: the constant learning rate's rate.
    assert [report.rate for report in log_of(model)] == [1.0, 0.2, 0.2]


def test_the_length_told_for_the_second_run_counts() -> None:
    model = adapt(total_steps=100)
    train(model, adamw(model), 3)
    train(model, SpIELOptimizer(adamw(model), model, total_steps=10), 2)
    assert log_of(model)[-1].rate == pytest.approx(0.2 * (1 - 2 / 10))


def test_a_run_interrupted_in_a_window_and_resumed_equals_one_that_was_not(tmp_path: Path) -> None:
    """A custom loop: save adapter and optimizer, load both into new objects, go on; at every step of a cycle."""
    for stop in range(1, 8):
        whole = adapt(total_steps=20, accumulation_steps=3)
        train(whole, adamw(whole), 11)
        model = adapt(total_steps=20, accumulation_steps=3)
        optimizer = adamw(model)
        train(model, optimizer, stop)
        model.save_pretrained(tmp_path / str(stop))
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        loaded = PeftModel.from_pretrained(mlp(), tmp_path / str(stop), is_trainable=True).train()
        resumed = adamw(loaded)
        resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
        train(loaded, resumed, 11 - stop, first=stop + 1)
        assert_same_run(loaded, whole)


def test_loading_into_the_same_model_goes_back_to_that_step(tmp_path: Path) -> None:
    """After loading, a new optimizer continues the loaded run instead of beginning another one."""
    model = adapt(total_steps=20, accumulation_steps=3)
    optimizer = adamw(model)
    train(model, optimizer, 5)
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 6, first=6)
    expected = copy.deepcopy(model)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    again = adamw(model)
    again.load_state_dict(state)
    train(model, again, 6, first=6)
    assert_same_run(model, expected)


def test_a_resumed_run_is_as_long_as_it_was(tmp_path: Path) -> None:
    model = adapt()
    train(model, SpIELOptimizer(adamw(model), model, total_steps=20), 3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True).train()
    train(loaded, adamw(loaded), 3, first=4)
    assert log_of(loaded)[-1].rate == pytest.approx(0.2 * (1 - 6 / 20))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_train_on_their_own(copied: object) -> None:
    model = adapt(total_steps=20)
    optimizer = adamw(model)
    train(model, optimizer, 5)
    other = copied(model)  # type: ignore[operator]
    before = indices_of(other)
    train(model, optimizer, 5, first=6)
    for name, delta in deltas_of(other).items():
        assert torch.equal(delta.indices, before[name])
    train(other, adamw(other), 1, first=6)
    assert log_of(other)[-1].step == 6
    assert len(log_of(model)) == 3


def test_freshness_is_a_property_of_the_whole_adapter() -> None:
    """One nonzero delta in any layer shows that the adapter was loaded."""
    model = adapt(total_steps=20)
    list(deltas_of(model).values())[-1].values.data[0] = 1e-3
    train(model, adamw(model), 2)
    assert log_of(model)[0].rate == pytest.approx(0.2 * 0.9)
