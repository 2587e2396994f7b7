"""Optimizers inside optimizers, and steps inside steps: one step of training, whatever takes part in it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.adapters import deltas_of, indices_of, log_of, trainable
from support.runs import assert_same_run, loss_of, train
from torch import Tensor, nn

from optimizers.around import (
    HooksOfSteps,
    Lookahead,
    OnTop,
    Several,
    SharedState,
    Sharpness,
    Stubborn,
    Twice,
    WithoutHooks,
)
from optimizers.catalogue import EVERY, TwoIterates
from optimizers.runs import GROWTHS, STEPS, fresh, plain_run
from spiel_peft import SM3, SpIELOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, SM3])
@pytest.mark.parametrize("outer", [Lookahead, WithoutHooks, HooksOfSteps])
def test_a_step_inside_a_step_counts_once(growth: str, kind: type[Any], outer: type[Any]) -> None:
    model = fresh(growth)
    inner = kind(trainable(model), lr=0.02)
    optimizer = outer(inner)
    seen = []
    for number in range(1, STEPS + 1):
        before = indices_of(model)
        states = {m: by_position(inner, optimizer, d) for m, d in deltas_of(model).items()}
        loss_of(model, number).backward()
        optimizer.step()
        inner.zero_grad()
        seen.append(any(not torch.equal(before[m], d.indices) for m, d in deltas_of(model).items()))
        for module, delta in deltas_of(model).items():
            assert delta.state.step == number
            now = by_position(inner, optimizer, delta)
            for position, slow in now["slow"].items():
                if position not in before[module].tolist():
                    assert slow == 0.0
                elif number > 1:
                    # Halfway from where it was, to where the values are now.
                    value = float(delta.values[delta.indices.tolist().index(position)])
                    assert slow == pytest.approx(value, abs=1e-7) or states[module]["slow"][position] == slow
    assert [report.step for report in log_of(model)] == [3, 7]
    assert [number for number, moved in enumerate(seen, 1) if moved] == [3, 7]
    if growth == "momentum":
        assert_accumulated_once(kind)


def by_position(inner: Any, outer: Any, delta: Any) -> dict[str, dict[int, float]]:
    slow = outer.state.get(delta.values, {}).get("slow", torch.zeros_like(delta.values))
    return {"slow": dict(zip(delta.indices.tolist(), slow.tolist(), strict=True))}


def assert_accumulated_once(kind: type[Any]) -> None:
    """Check that the accumulators equal those of the same first step without the wrapper."""
    rows = []
    for wrap in (True, False):
        model = fresh("momentum")
        inner = kind(trainable(model), lr=0.02)
        train(model, Lookahead(inner) if wrap else inner, 1)
        rows.append([delta.state.row for delta in deltas_of(model).values()])
    for a, b in zip(*rows, strict=True):
        assert a.any()
        assert torch.equal(a, b)


@pytest.mark.parametrize("growth", GROWTHS)
def test_sharpness_aware_minimization(growth: str) -> None:
    """Two evaluations of the closure and a step inside are one step of training."""
    model = fresh(growth, total_steps=60)
    optimizer = Sharpness(torch.optim.AdamW(trainable(model), lr=0.02))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 1)
        loss.backward()
        return loss

    before = loss_of(model, 1).item()
    for _ in range(20):
        optimizer.step(closure)
    assert loss_of(model, 1).item() < 0.9 * before
    assert [report.step for report in log_of(model)] == [3, 7, 11, 15, 19]
    for delta in deltas_of(model).values():
        assert delta.state.step == 20
        assert (optimizer.inner.state[delta.values]["exp_avg_sq"] > 0).all()


def test_a_closure_evaluated_twice_is_accumulated_once() -> None:
    rows = []
    for kind in (Twice, torch.optim.SGD):
        model = fresh("momentum")
        optimizer = kind(trainable(model), lr=0.1)

        def closure(model: PeftModel = model) -> Tensor:
            model.zero_grad()
            loss = loss_of(model, 1)
            loss.backward()
            return loss

        optimizer.step(closure)
        rows.append([delta.state.row for delta in deltas_of(model).values()])
    for a, b in zip(*rows, strict=True):
        assert a.any()
        assert torch.equal(a, b)


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("by_closure", [False, True])
def test_a_subclass_that_calls_its_base_class_counts_once(growth: str, by_closure: bool) -> None:
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # hooks come with a class's first instance
    model = fresh(growth)
    optimizer = OnTop(trainable(model), lr=0.02)
    for number in range(1, STEPS + 1):

        def closure(number: int = number) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            return loss

        if by_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    assert [report.step for report in log_of(model)] == [3, 7]
    for delta in deltas_of(model).values():
        assert delta.state.step == STEPS == int(optimizer.state[delta.values]["step"])


def test_a_step_tried_twice_counts_once() -> None:
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # hooks come with a class's first instance
    model = fresh()
    optimizer = Stubborn(trainable(model), lr=0.02)
    for number in range(1, STEPS + 1):
        optimizer.failures = 1
        loss_of(model, number).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not optimizer.failures
    assert_same_run(model, plain_run("adamw"))


@pytest.mark.parametrize("deltas_first", [True, False])
def test_an_optimizer_for_deltas_and_one_for_the_rest(deltas_first: bool) -> None:
    """Only one of the two optimizers has deltas, and its state follows them."""
    model = fresh(bias="all")
    values = [delta.values for delta in deltas_of(model).values()]
    rest = [p for p in trainable(model) if not any(p is value for value in values)]
    parts = [torch.optim.AdamW(values, lr=0.02), torch.optim.SGD(rest, lr=0.1)]
    train(model, Several(*parts if deltas_first else parts[::-1]), STEPS)
    reference = fresh(bias="all")
    values = [delta.values for delta in deltas_of(reference).values()]
    rest = [p for p in trainable(reference) if not any(p is value for value in values)]
    optimizers = [torch.optim.AdamW(values, lr=0.02), torch.optim.SGD(rest, lr=0.1)]
    for number in range(1, STEPS + 1):
        loss_of(reference, number).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert log_of(model)[1].replaced > 0
    assert_same_run(model, reference)


@pytest.mark.parametrize("outer", [Sharpness, SharedState])
@pytest.mark.parametrize("name", ["adamw", "lion-without-step"])
def test_state_that_two_optimizers_share_moves_once(outer: type[Any], name: str) -> None:
    """No distance uphill: the run of the optimizer inside, whose rules hold."""
    model = fresh()
    optimizer = outer(EVERY[name](trainable(model)), rho=0.0)
    for number in range(1, STEPS + 1):

        def closure(number: int = number) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            return loss

        optimizer.step(closure)
    reference, inner = fresh(), optimizer.inner
    expected = EVERY[name](trainable(reference))
    train(reference, expected, STEPS)
    assert log_of(reference)[1].replaced > 0
    assert_same_run(model, reference)
    for ours, theirs in zip(deltas_of(model).values(), deltas_of(reference).values(), strict=True):
        assert torch.equal(inner.state[ours.values]["exp_avg"], expected.state[theirs.values]["exp_avg"])


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("stop", [1, 3, 4, 5, 6])
def test_resuming_by_a_state_dict_with_another_inside(wrap: bool, stop: int) -> None:
    """Training state travels in that of the optimizer inside; stopped in windows, at a close and between."""
    runs = []
    for end in (STEPS, stop):
        model = fresh()
        optimizer = HooksOfSteps(torch.optim.AdamW(trainable(model), lr=0.02))
        train(model, SpIELOptimizer(optimizer, model) if wrap else optimizer, end)
        runs.append((model, optimizer))
    (whole, _), (model, optimizer) = runs
    again = fresh()
    resumed = HooksOfSteps(torch.optim.AdamW(trainable(again), lr=0.02))
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(again, SpIELOptimizer(resumed, again) if wrap else resumed, STEPS - stop, first=stop + 1)
    assert log_of(whole)[1].replaced > 0
    assert_same_run(again, whole)


def test_a_step_that_fails_is_over() -> None:
    """The next one, of another optimizer, is a step of its own."""

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("out of luck")

    model = fresh()
    loss_of(model, 1).backward()
    failing = Failing(trainable(model), lr=0.1)
    with pytest.raises(RuntimeError, match="out of luck"):
        failing.step()
    model.zero_grad()
    train(model, EVERY["adamw"](trainable(model)), STEPS)
    assert_same_run(model, plain_run("adamw"))


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("name", ["adamw", "sgd-momentum", "bnb-adamw"])
def test_one_optimizer_per_parameter_inside_the_backward_pass(name: str, growth: str) -> None:
    """Each steps as soon as its gradient is there, to save the memory of gradients: the same run."""
    model = fresh(growth)
    optimizers = {p: EVERY[name]([p]) for p in trainable(model)}

    def step(p: nn.Parameter) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)
    for number in range(1, STEPS + 1):
        loss_of(model, number).backward()
    assert_same_run(model, plain_run(name, growth))


def test_switching_between_two_iterates_keeps_both_in_place() -> None:
    """Schedule-Free's evaluation mode mixes its iterates: they must be of the same positions."""
    model = fresh()
    optimizer = TwoIterates(trainable(model))
    for number in range(1, STEPS + 1):
        loss_of(model, number).backward()
        optimizer.step()
        optimizer.zero_grad()
        for delta in deltas_of(model).values():
            z = optimizer.state[delta.values]["z"]
            if number in (3, 7):
                # What has just come is zero in both.
                assert ((delta.values == 0) == (z == 0)).all()
