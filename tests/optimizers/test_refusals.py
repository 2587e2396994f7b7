"""Optimizers whose state cannot follow the deltas are refused by name, early and before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.adapters import deltas_of, indices_of, log_of, trainable
from support.runs import adamw, adapt, loss_of, train
from support.trainer_runs import regression, trainer
from torch import nn

from optimizers.refused import BY_STATE, Coded, InBackward, Keeping, Listed, Offloaded, Sliced
from spiel_peft import SpIELCallback, SpIELOptimizer
from spiel_peft.cycle import optimizer_buffers


def assert_untouched(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check that no step was counted or taken."""
    for delta in deltas_of(model).values():
        assert not delta.values.detach().any()
        assert delta.state.step == 0
        assert not optimizer.state.get(delta.values)


class Forwarding(Sliced):
    """Passes all its settings on."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, lr=settings.pop("lr", 0.01))


class InOneDict(torch.optim.SGD):
    """Keeps where the parameters began, of all of them under one name."""

    def step(self, closure: Any = None) -> None:
        start = self.state.setdefault("start", {})
        for p in self.param_groups[0]["params"]:
            start.setdefault(p, p.detach().clone())
        super().step(closure)


KEPT = {Listed: r"'history' \(in a list: .* 12 deltas", Coded: r"'history' \(in a dict: .* 12 deltas"} | {
    InOneDict: "'start' for all parameters together"
}


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("kind", [*BY_STATE, Forwarding, InOneDict])
def test_state_that_cannot_follow_is_refused_before_anything_is_moved(
    kind: type[torch.optim.Optimizer], attached: bool
) -> None:
    """State exists only after a step, so the first close checks it before it changes anything."""
    model = adapt(accumulation_steps=2)
    optimizer = kind(trainable(model), lr=0.01)
    train(model, SpIELOptimizer(optimizer, model) if attached else optimizer, 1)
    indices = indices_of(model)
    loss_of(model, 2).backward()
    kept = KEPT.get(kind, r"'history' \(\w+\d+, shape .* 12 deltas")
    with pytest.raises(TypeError, match=rf"{kind.__name__} keeps state {kept}.*growth='none'"):
        optimizer.step()
    for name, delta in deltas_of(model).items():
        assert torch.equal(delta.indices, indices[name])
        assert delta.values.detach().any()
    assert log_of(model) == []


def test_refused_under_the_callback(tmp_path: Path) -> None:
    model = regression()
    optimizer = Sliced(trainable(model))
    with pytest.raises(TypeError, match="Sliced keeps state 'history'"):
        trainer(model, tmp_path, [SpIELCallback()], optimizer).train()
    assert log_of(model) == []


def test_no_growth_needs_no_permutation() -> None:
    model = adapt(growth="none")
    optimizer = Sliced(trainable(model))
    train(model, SpIELOptimizer(optimizer, model), 3)
    assert optimizer.state[next(iter(deltas_of(model).values())).values]["history"].numel() == 2


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
    """State for copies of the parameters is found; without permuting, it would belong to the wrong positions."""
    model = adapt()
    optimizer = Offloaded(trainable(model))
    train(model, optimizer, 1)
    indices = indices_of(model)
    loss_of(model, 2).backward()
    with pytest.raises(TypeError, match=r"Offloaded keeps its state in other optimizers \('inner': AdamW\)"):
        optimizer.step()
    for name, delta in deltas_of(model).items():
        assert torch.equal(delta.indices, indices[name])


def test_settings_decide_what_an_optimizer_keeps() -> None:
    """Prodigy keeps whole buffers unless it is told to slice them: the class alone does not tell."""

    class Configured(Keeping):
        def __init__(self, params: Any, every: int = 1) -> None:
            super().__init__(params)
            self.every = every

        def kept(self, parameter: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(parameter)[:: self.every]

    model = adapt()
    train(model, SpIELOptimizer(Configured(trainable(model)), model, total_steps=20), 6)
    assert [report.step for report in log_of(model)] == [2, 6]
    other = adapt()
    optimizer = SpIELOptimizer(Configured(trainable(other), every=11), other, total_steps=20)
    with pytest.raises(TypeError, match="Configured keeps state 'history'"):
        train(other, optimizer, 6)


def test_state_is_looked_at_only_where_something_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    model = adapt(total_steps=20)
    optimizer = adamw(model)

    def count(*args: Any) -> list[Any]:
        looked.append(number)
        return []

    monkeypatch.setattr(optimizer_buffers, "buffers_of", count)
    for number in range(1, 8):
        loss_of(model, number).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sorted(set(looked)) == [1, 2, 6]
