"""Optimizers that cannot be followed are refused by name, as early as can be, and before anything is changed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cycle.helpers import adamw, adapt, deltas_of, indices_of, log_of, loss_of, train, trainable
from peft import PeftModel
from torch import nn
from trainer_helpers import regression, trainer

from optimizers.refused import BY_STATE, Coded, InBackward, Keeping, Listed, Offloaded, Reluctant, Sliced
from spiel_peft import SpIELCallback, SpIELOptimizer
from spiel_peft.cycle import optimizer_check


def assert_untouched(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Not a step was counted or taken."""
    for delta in deltas_of(model).values():
        assert not delta.values.detach().any()
        assert delta.state.step == 0
        assert not optimizer.state.get(delta.values)


@pytest.mark.parametrize("kind", BY_STATE)
def test_refused_when_it_is_attached(kind: type[Keeping]) -> None:
    model = adapt()
    optimizer = kind(trainable(model))
    container = {Listed: "in a list: ", Coded: "in a dict: "}.get(kind, "")
    match = rf"{kind.__name__} keeps state 'history' \({container}\w+\d+, shape .* 64 deltas.*growth='none'"
    with pytest.raises(TypeError, match=match):
        SpIELOptimizer(optimizer, model)
    assert_untouched(model, optimizer)


@pytest.mark.parametrize("kind", BY_STATE)
def test_refused_at_the_first_step_where_nobody_attaches_it(kind: type[Keeping]) -> None:
    model = adapt()
    optimizer = kind(trainable(model))
    loss_of(model, 1).backward()
    for _ in range(2):
        with pytest.raises(TypeError, match=f"{kind.__name__} keeps state 'history'"):
            optimizer.step()
    assert_untouched(model, optimizer)


def test_refused_when_training_begins_under_the_callback(tmp_path: Path) -> None:
    model = regression()
    optimizer = Sliced(trainable(model))
    with pytest.raises(TypeError, match="Sliced keeps state 'history'"):
        trainer(model, tmp_path, [SpIELCallback()], optimizer).train()
    assert_untouched(model, optimizer)


def test_no_growth_needs_no_permutation() -> None:
    model = adapt(growth="none")
    optimizer = Sliced(trainable(model))
    train(model, SpIELOptimizer(optimizer, model), 3)
    assert optimizer.state[next(iter(deltas_of(model).values())).values]["history"].numel() == 2


def test_what_cannot_be_known_before_is_refused_before_anything_is_moved() -> None:
    """Its constructor wants what nobody can give it, so its state shows only once it has stepped."""
    model = adapt(accumulation_steps=2)
    optimizer = Reluctant(trainable(model), model)
    train(model, SpIELOptimizer(optimizer, model), 1)
    indices = indices_of(model)
    loss_of(model, 2).backward()
    with pytest.raises(TypeError, match=r"Reluctant keeps state 'history' \(float32, shape \(2,\)\) for 12 deltas"):
        optimizer.step()
    for name, delta in deltas_of(model).items():
        assert torch.equal(delta.indices, indices[name])
        assert delta.values.detach().abs().max() <= 0.02 + 1e-6
        assert delta.values.detach().any()
    assert log_of(model) == []


def test_state_that_was_loaded_is_looked_at() -> None:
    model = adapt()
    optimizer = adamw(model)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = torch.zeros(5)
    again = adapt()
    resumed = adamw(again)
    resumed.load_state_dict(saved)
    with pytest.raises(TypeError, match=r"AdamW keeps state 'exp_avg' \(float32, shape \(5,\)\) for 12 deltas"):
        SpIELOptimizer(resumed, again)


def test_lbfgs() -> None:
    model = adapt()
    optimizer = torch.optim.LBFGS(trainable(model))
    with pytest.raises(TypeError, match="LBFGS keeps state 'old_dirs', one history of all parameters"):
        SpIELOptimizer(optimizer, model)
    train_by_closure(adapt(growth="none"), lambda params: torch.optim.LBFGS(params, max_iter=2))


def train_by_closure(model: PeftModel, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
    optimizer = make(trainable(model))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 1)
        loss.backward()
        return loss

    before = loss_of(model, 1).item()
    for _ in range(3):
        optimizer.step(closure)
    assert loss_of(model, 1).item() < before


def test_an_optimizer_that_steps_in_the_backward_pass() -> None:
    model = adapt()
    with pytest.raises(TypeError, match=r"InBackward has no step of its own.*backward pass.*growth='none'"):
        SpIELOptimizer(InBackward(trainable(model)), model)


def test_state_in_other_optimizers_is_found() -> None:
    """For copies of the parameters: permuting nothing would leave it to the wrong positions."""
    model = adapt()
    optimizer = Offloaded(trainable(model))
    train(model, optimizer, 1)
    indices = indices_of(model)
    loss_of(model, 2).backward()
    with pytest.raises(TypeError, match=r"Offloaded keeps its state in other optimizers \('inner': AdamW\)"):
        optimizer.step()
    for name, delta in deltas_of(model).items():
        assert torch.equal(delta.indices, indices[name])


class Noisy(torch.optim.SGD):
    """Draws from the global generator, warns, and counts its steps for all instances together."""

    steps_of_all = 0

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, lr=lr)

    def step(self, closure: Any = None) -> None:
        Noisy.steps_of_all += 1
        torch.rand(3)
        warnings.warn("noise", stacklevel=2)
        super().step(closure)


def test_looking_at_a_class_leaves_no_trace() -> None:
    model = adapt()
    optimizer = Noisy(trainable(model))
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SpIELOptimizer(optimizer, model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert Noisy.steps_of_all == 4
    assert_untouched(model, optimizer)
    # Once per optimizer.
    SpIELOptimizer(optimizer, model)
    assert Noisy.steps_of_all == 4


class CodedIfLarge(Coded):
    """Keeps few entries as they are."""

    def kept(self, parameter: torch.Tensor) -> Any:
        return super().kept(parameter) if parameter.numel() >= 4096 else torch.zeros_like(parameter)


class Forwarding(Sliced):
    """Hands its settings on, and takes any."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, lr=settings.pop("lr", 0.01))


class InOneDict(torch.optim.SGD):
    """Keeps where the parameters began, of all of them under one name."""

    def step(self, closure: Any = None) -> None:
        start = self.state.setdefault("start", {})
        for p in self.param_groups[0]["params"]:
            start.setdefault(p, p.detach().clone())
        super().step(closure)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        (CodedIfLarge, "'history' .* for 8192 deltas"),
        (Forwarding, "'history' .* for 64 deltas"),
        (InOneDict, "'start' for all parameters together"),
    ],
)
def test_refused_when_it_is_attached_whatever_hides_it(kind: type[torch.optim.Optimizer], kept: str) -> None:
    model = adapt()
    optimizer = kind(trainable(model), lr=0.01)
    with pytest.raises(TypeError, match=rf"{kind.__name__} keeps state {kept}.*growth='none'"):
        SpIELOptimizer(optimizer, model)
    assert_untouched(model, optimizer)


class Slow(torch.optim.SGD):
    """As costly for many entries as a preconditioner is."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            assert p.numel() <= 64, "minutes"
            self.state[p]["matrix"] = torch.eye(p.numel())
        super().step(closure)


def test_a_preconditioner_is_not_tried_on_many_entries() -> None:
    model = adapt()
    with pytest.raises(TypeError, match=r"Slow keeps state 'matrix' \(float32, shape \(64, 64\)\)"):
        SpIELOptimizer(Slow(trainable(model), lr=0.01), model)


def test_settings_reach_the_rehearsal() -> None:
    """Prodigy keeps whole buffers unless it is told to slice them: the class alone does not tell."""

    class Configured(Keeping):
        def __init__(self, params: Any, lr: float = 0.01, every: int = 1, *, scale: float = 1.0) -> None:
            super().__init__(params, lr)
            self.scale = scale
            for group in self.param_groups:
                group["every"] = every

        def kept(self, parameter: torch.Tensor) -> torch.Tensor:
            assert self.scale == 3.0
            return torch.zeros_like(parameter)[:: self.param_groups[0]["every"]]

    model = adapt()
    train(model, SpIELOptimizer(Configured(trainable(model), scale=3.0), model, total_steps=20), 6)
    assert [report.step for report in log_of(model)] == [2, 6]
    other = adapt()
    with pytest.raises(TypeError, match="Configured keeps state 'history'"):
        SpIELOptimizer(Configured(trainable(other), every=11, scale=3.0), other)


def test_state_is_looked_at_only_where_something_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    model = adapt(total_steps=20)
    optimizer = adamw(model)

    def count(*args: Any) -> list[Any]:
        looked.append(number)
        return []

    monkeypatch.setattr(optimizer_check, "buffers_of", count)
    for number in range(1, 8):
        loss_of(model, number).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sorted(set(looked)) == [1, 2, 6]
