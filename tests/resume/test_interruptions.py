"""Checkpoints at unusual moments, several adapters or optimizers, longer runs, and loading an earlier step."""

from __future__ import annotations

import copy
import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.adapters import deltas_of, first_delta, log_of
from support.models import mlp
from support.runs import adamw, adapt, assert_same, assert_same_run, train
from torch import nn

from spiel_peft import SpIELConfig, SpIELOptimizer

from .helpers import STEPS, Run
from .test_state_dicts import accelerate_state, save_pretrained, state_dicts

ROUTES = [state_dicts, save_pretrained, accelerate_state]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_a_checkpoint_between_micro_batches(route: Any, tmp_path: Path) -> None:
    """No checkpoint has accumulated gradients. The step is repeated, or continues as if they had been zeroed."""
    whole = Run(micro_batches=3).train(1)
    for stop in (2, 6):
        run = Run(micro_batches=3).train(1, stop - 1)
        run.micro_batch(stop, 0)
        over, rest = (route(run, folder) for folder in folders(tmp_path / str(stop), 2))
        assert_same(over.train(stop).everything(), whole.everything())
        ends = []
        for each in (rest, run):
            each.model.zero_grad()
            each.micro_batch(stop, 1)
            each.micro_batch(stop, 2)
            each.step()
            ends.append(each.train(stop + 1).everything())
        assert_same(*ends)


def folders(parent: Path, count: int) -> list[Path]:
    new = [parent / str(number) for number in range(count)]
    for folder in new:
        folder.mkdir(parents=True)
    return new


def test_longer_than_planned(tmp_path: Path) -> None:
    """A resumed run with a new length equals a run that got the length without interruption."""
    for stop in (7, 9):
        run = Run(total_steps=9).train(1, stop)
        folder = tmp_path / str(stop)
        folder.mkdir()
        run.settings["total_steps"] = STEPS
        again = state_dicts(run, folder).train(stop + 1)
        run.optimizer = SpIELOptimizer(run.optimizer, run.model, total_steps=STEPS)
        run.train(stop + 1)
        assert_same(again.everything(), run.everything())
        assert [report.rate for report in log_of(again.model)][-1] == pytest.approx(0.2 * (1 - 13 / STEPS))


def test_a_finished_run_without_its_optimizer_is_over(tmp_path: Path) -> None:
    """Deltas of a finished run with a new optimizer begin another run."""
    Run(total_steps=9).train(1, 9).model.save_pretrained(tmp_path)
    run = Run()
    run.use(PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True))
    run.train(1, 4)
    assert first_delta(run.model).state.step == 4
    assert [report.step for report in log_of(run.model)] == [3]


def test_an_optimizer_that_is_found_late_is_reported() -> None:
    """Where the garbage collector knows it no more, the first step of the window lacks its gradients."""
    whole, run = Run().train(1), Run().train(1, 6)
    for wrapped in (False, True):
        again = Run(wrapped=wrapped)
        again.model.load_state_dict(run.model.state_dict())
        again.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        gc.freeze()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                again.train(7, 7)
        finally:
            gc.unfreeze()
        told = [w for w in caught if "found with its optimizer only at the step" in str(w.message)]
        assert len(told) == (0 if wrapped else 1)
        assert first_delta(again.model).state.step == 7
        assert [report.step for report in log_of(again.train(8).model)] == [8, 13]
    assert_same(again.everything(), whole.everything())


def test_optimizers_of_earlier_runs_do_not_confuse(tmp_path: Path) -> None:
    """Several optimizers are loaded for the same deltas from different checkpoints; the one that steps counts."""
    whole, run = Run().train(1), Run().train(1, 5)
    early = copy.deepcopy(run.optimizer.state_dict())
    run.train(6, 7)
    again = state_dicts(run, tmp_path)
    idle = again.make([delta.values for delta in deltas_of(again.model).values()])
    idle.load_state_dict(early)
    cycle = [idle]
    cycle.append(cycle)  # only the garbage collector can free it
    del idle, cycle
    assert_same(again.train(8).everything(), whole.everything())


SECOND = {"target_modules": ["0", "2"], "density": 0.3, "regrow_every": 4, "accumulation_steps": 2, "seed": 5}


def two_adapters() -> PeftModel:
    model = adapt(total_steps=20)
    model.add_adapter("second", SpIELConfig(**{**SECOND, "growth": "momentum"}))
    model.base_model.set_adapter(["default", "second"])
    return model.train()


def test_two_adapters_under_one_optimizer() -> None:
    whole = two_adapters()
    train(whole, adamw(whole), 11)
    for stop in (1, 4, 5):
        model, again = two_adapters(), two_adapters()
        optimizer, resumed = adamw(model), adamw(again)
        train(model, optimizer, stop)
        again.load_state_dict(model.state_dict())
        resumed.load_state_dict(optimizer.state_dict())
        train(again, resumed, 11 - stop, first=stop + 1)
        assert_same_run(again, whole)
        for name, delta in deltas_of(again, "second").items():
            assert torch.equal(delta.values, deltas_of(whole, "second")[name].values)


class Both:
    """One optimizer per layer, stepped together."""

    def __init__(self, model: nn.Module) -> None:
        self.parts = [torch.optim.SGD([d.values], lr=0.05, momentum=0.9) for d in deltas_of(model).values()]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()


def test_one_adapter_under_two_optimizers() -> None:
    whole = adapt(total_steps=20)
    train(whole, Both(whole), 11)  # type: ignore[arg-type]
    for stop in (1, 4, 5):
        model, again = adapt(total_steps=20), adapt(total_steps=20)
        optimizers, resumed = Both(model), Both(again)
        train(model, optimizers, stop)  # type: ignore[arg-type]
        again.load_state_dict(model.state_dict())
        for old, new in zip(optimizers.parts, resumed.parts, strict=True):
            new.load_state_dict(copy.deepcopy(old.state_dict()))
        train(again, resumed, 11 - stop, first=stop + 1)  # type: ignore[arg-type]
        assert_same_run(again, whole)


def test_an_optimizer_that_takes_over_goes_on() -> None:
    """A second optimizer for the same deltas begins a new run, unless it was given the state of the first."""
    whole, run = Run().train(1), Run().train(1, 7)
    state = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer = run.make([delta.values for delta in deltas_of(run.model).values()])
    run.optimizer.load_state_dict(state)
    assert_same(run.train(8).everything(), whole.everything())


def test_deltas_that_go_back_without_their_optimizer(tmp_path: Path) -> None:
    """The optimizer's moments belong to other indices, so they are reset; they stay where no index has changed."""
    run = Run().train(1, 5)
    run.model.save_pretrained(tmp_path)
    run.train(6, 7)  # no close: same indices
    run.model.load_adapter(tmp_path, "default", is_trainable=True)
    run.train(6, 7)
    assert all(int(run.optimizer.state[d.values]["step"]) == 9 for d in deltas_of(run.model).values())
    run.train(8, 10)  # a close
    run.model.load_adapter(tmp_path, "default", is_trainable=True)
    before = {name: delta.indices.clone() for name, delta in deltas_of(run.model).items()}
    run.train(6, 7)
    for name, delta in deltas_of(run.model).items():
        assert torch.equal(delta.indices, before[name])
        assert int(run.optimizer.state[delta.values]["step"]) == 2
        assert delta.state.step == 7


def test_loading_values_in_place() -> None:
    """A loader copies into the tensors without calling the module."""
    whole, run, again = Run().train(1), Run().train(1, 7), Run()
    tensors = run.model.state_dict()
    for name, tensor in again.model.state_dict().items():
        tensor.copy_(tensors[name])
    again.optimizer.load_state_dict(run.optimizer.state_dict())
    assert_same(again.train(8).everything(), whole.everything())


def test_group_entries_are_gone_once_they_are_taken_up(tmp_path: Path) -> None:
    again = state_dicts(Run().train(1, 7), tmp_path)
    (group,) = again.optimizer.param_groups
    assert "spiel_training_state" in group
    again.micro_batch(8, 0)
    assert "spiel_training_state" not in group
    again.step()
    assert "spiel_training_state" not in again.optimizer.param_groups[0]
    assert "spiel_training_state" in again.optimizer.state_dict()["param_groups"][0]
