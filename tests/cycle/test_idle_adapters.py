"""Adapters that are not the active one when an optimizer steps, and deltas that no gradient reaches."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.adapters import deltas_of, log_of, trainable
from support.models import mlp
from support.runs import adapt, loss_of
from torch import Tensor, nn

from spiel_peft import SpIELConfig, SpIELOptimizer

TIMES = {"regrow_every": 4, "accumulation_steps": 2}


def two_adapters() -> PeftModel:
    """Adapters "default" and "b", "default" active."""
    model = adapt(seed=1, **TIMES)
    model.add_adapter("b", SpIELConfig(target_modules=["0", "2"], density=0.2, seed=2, **TIMES))
    return model.train()


def values_of(model: PeftModel, adapter: str) -> list[nn.Parameter]:
    return [delta.values for delta in deltas_of(model, adapter).values()]


def closes(model: PeftModel, adapter: str) -> list[int]:
    return [report.step for report in log_of(model, adapter)]


def alone(adapter: str, steps: Iterable[int]) -> PeftModel:
    """The run of one adapter by itself."""
    model = two_adapters()
    model.set_adapter(adapter)
    optimizer = torch.optim.AdamW(values_of(model, adapter), lr=0.01)
    for number in steps:
        loss_of(model, number).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_same_adapter(model: PeftModel, expected: PeftModel, adapter: str) -> None:
    ours, theirs = deltas_of(model, adapter), deltas_of(expected, adapter)
    for name, delta in ours.items():
        assert torch.equal(delta.indices, theirs[name].indices), name
        assert torch.equal(delta.values, theirs[name].values), name
    assert closes(model, adapter) == closes(expected, adapter)


@pytest.mark.parametrize("one_optimizer", [True, False])
@pytest.mark.parametrize("last", ["default", "b"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_adapters_accumulated_in_turn_are_both_trained(one_optimizer: bool, last: str, set_to_none: bool) -> None:
    """Each adapter's run is the one that it has by itself, whichever is active at the step."""
    model = two_adapters()
    names = ["b", "default"] if last == "default" else ["default", "b"]
    parameters = {name: values_of(model, name) for name in names}
    groups = [sum(parameters.values(), [])] if one_optimizer else [parameters["default"], parameters["b"]]
    optimizers = [torch.optim.AdamW(group, lr=0.01) for group in groups]
    for number in range(1, 11):
        for name in names:
            model.set_adapter(name)
            loss_of(model, number).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)
    for name in names:
        assert closes(model, name) == [2, 6, 10]
        assert_same_adapter(model, alone(name, range(1, 11)), name)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_an_adapter_without_a_gradient_does_not_advance(set_to_none: bool) -> None:
    """Zeros that zero_grad leaves are no gradient: the idle adapter's steps are those in which it was used."""
    model = two_adapters()
    # Without momentum, zero gradients change nothing.
    optimizer = torch.optim.SGD([*values_of(model, "default"), *values_of(model, "b")], lr=0.1)
    for number in range(1, 13):
        model.set_adapter("b" if number % 3 == 0 else "default")
        loss_of(model, number).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    steps = {name: {d.state.step for d in deltas_of(model, name).values()} for name in ("default", "b")}
    assert steps == {"default": {8}, "b": {4}}
    assert closes(model, "default") == [2, 6] and closes(model, "b") == [2]


def test_a_gradient_that_the_loop_itself_assigns_counts() -> None:
    model = adapt(growth="momentum", **TIMES)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for _ in range(2):
        for parameter in trainable(model):
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert closes(model, "default") == [2]


def test_the_length_of_the_run_reaches_idle_adapters() -> None:
    model = two_adapters()
    optimizer = torch.optim.AdamW([*values_of(model, "default"), *values_of(model, "b")], lr=0.01)
    SpIELOptimizer(optimizer, model, total_steps=50)
    assert {d.run.total_steps for name in ("default", "b") for d in deltas_of(model, name).values()} == {50}


class ReadsPastForward(nn.Module):
    """Uses the weight of one of its layers without calling it, as fused kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.unused = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x).tanh() @ self.read.weight.T


@pytest.mark.parametrize("growth", ["accumulated_gradient", "momentum", "none"])
def test_deltas_that_never_get_a_gradient_are_named_once(growth: str) -> None:
    config = SpIELConfig(target_modules=["called", "read", "unused"], density=0.5, growth=growth, **TIMES)
    model = get_peft_model(ReadsPastForward(), config).train()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(1, 11):
            loss_of(model, number).backward()
            optimizer.step()
            optimizer.zero_grad()
            said = [str(w.message) for w in caught if "have had no gradient" in str(w.message)]
            assert len(said) == int(number >= 2)
    assert "2 of 3 modules" in said[0] and "'read', 'unused'" in said[0] and "called'" not in said[0]


def test_an_adapter_that_nothing_reaches_is_named_after_a_cycle() -> None:
    model = get_peft_model(ReadsPastForward(), SpIELConfig(target_modules=["read"], density=0.5, **TIMES)).train()
    x = nn.Parameter(torch.randn(4, 6))
    optimizer = torch.optim.AdamW([x, *trainable(model)], lr=0.01)
    with pytest.warns(UserWarning, match="1 of 1 modules have had no gradient"):
        for _ in range(6):
            model(x).sum().backward()
            optimizer.step()


def test_no_warning_where_every_delta_is_reached() -> None:
    model = adapt(**TIMES)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no gradient.*")
        for number in range(1, 8):
            loss_of(model, number).backward()
            optimizer.step()
            optimizer.zero_grad()


def test_optimizers_without_deltas_look_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their steps make no lookup through `nn.Module.__getattr__`, of which a step with many deltas made thousands."""
    models = [adapt() for _ in range(10)]
    other = mlp()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    loss_of(other, 1).backward()
    looked_up: list[str] = []
    getattr_of_module = nn.Module.__getattr__

    def counting(module: nn.Module, name: str) -> object:
        looked_up.append(name)
        return getattr_of_module(module, name)

    monkeypatch.setattr(nn.Module, "__getattr__", counting)
    optimizer.step()
    assert looked_up == []
    assert sum(len(list(model.parameters())) for model in models) > 0
