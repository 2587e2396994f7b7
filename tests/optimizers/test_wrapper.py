"""`SpIELOptimizer` works wherever an optimizer is expected."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from accelerate import Accelerator
from support.adapters import deltas_of, log_of, trainable
from support.models import mlp
from support.runs import adamw, adapt, assert_same_run, loss_of, train
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from spiel_peft import SM3, SpIELOptimizer


def wrapped(model: torch.nn.Module, **settings: object) -> SpIELOptimizer:
    return SpIELOptimizer(adamw(model, **settings), model, total_steps=20)


def reference(steps: int = 7) -> torch.nn.Module:
    model = adapt(total_steps=20)
    train(model, adamw(model), steps)
    return model


def test_same_run_as_without_it() -> None:
    model = adapt()
    train(model, wrapped(model), 7)
    assert_same_run(model, reference())
    assert [report.step for report in log_of(model)] == [2, 6]


def test_attaching_twice_runs_the_cycle_once() -> None:
    model = adapt()
    base = adamw(model)
    inner = SpIELOptimizer(base, model, total_steps=20)
    SpIELOptimizer(base, model)
    train(model, SpIELOptimizer(inner, model, total_steps=20), 7)
    assert_same_run(model, reference())
    assert [report.step for report in log_of(model)] == [2, 6]


def test_total_steps_overrides_the_config() -> None:
    model = adapt(total_steps=500)
    train(model, wrapped(model), 7)
    assert_same_run(model, reference())


@pytest.mark.parametrize("total_steps", [0, -3, 2.5, True, "10"])
def test_wrong_total_steps(total_steps: object) -> None:
    model = adapt(total_steps=20)
    with pytest.raises(ValueError, match="total_steps must be a positive int .* got"):
        SpIELOptimizer(adamw(model), model, total_steps=total_steps)
    assert next(iter(deltas_of(model).values())).run.total_steps == 20


def test_needs_an_optimizer_that_holds_the_deltas() -> None:
    model, plain = adapt(), mlp()
    with pytest.raises(ValueError, match="holds none of the model's SpIEL values"):
        SpIELOptimizer(torch.optim.SGD(plain.parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match="holds none of the model's SpIEL values"):
        SpIELOptimizer(torch.optim.SGD(plain.parameters(), lr=0.1), plain)
    with pytest.raises(ValueError, match="holds none of the model's SpIEL values"):
        SpIELOptimizer(adamw(adapt()), model)
    with pytest.raises(TypeError, match="base_optimizer must be a torch.optim.Optimizer, got list"):
        SpIELOptimizer(trainable(model), model)  # type: ignore[arg-type]


def one_cycle(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.05, total_steps=9)


def lambda_lr(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 1 / (1 + step))


@pytest.mark.parametrize("make", [lambda_lr, one_cycle])
@pytest.mark.filterwarnings("error:Detected call of:UserWarning")
def test_learning_rate_schedulers(make: object) -> None:
    runs = []
    for wrap in (True, False):
        model = adapt(total_steps=20)
        optimizer = wrapped(model) if wrap else adamw(model)
        schedule = make(optimizer)  # type: ignore[operator]
        rates: list[float] = []
        train(model, optimizer, 7, after=lambda _, s=schedule, r=rates: (s.step(), r.append(s.get_last_lr()[0])))
        runs.append((model, rates))
    assert runs[0][1] == runs[1][1]
    assert len(set(runs[0][1])) > 3
    assert_same_run(runs[0][0], runs[1][0])


def test_closure() -> None:
    model = adapt()
    optimizer = wrapped(model)
    for number in range(1, 8):

        def closure(number: int = number) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
    assert_same_run(model, reference())


def test_state_dict_round_trip() -> None:
    model = adapt()
    optimizer = wrapped(model)
    train(model, optimizer, 5)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    restored = wrapped(twin)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    train(model, optimizer, 4, first=6)
    train(twin, restored, 4, first=6)
    assert_same_run(model, twin)
    assert optimizer.state_dict().keys() == adamw(model).state_dict().keys()


def test_state_dict_copies_and_pickles() -> None:
    model = adapt()
    optimizer = wrapped(model)
    train(model, optimizer, 3)
    for again in (copy.deepcopy(optimizer.state_dict()), pickle.loads(pickle.dumps(optimizer.state_dict()))):
        assert again["param_groups"] == optimizer.state_dict()["param_groups"]
        state = optimizer.state_dict()["state"]
        assert all(torch.equal(again["state"][p]["exp_avg"], state[p]["exp_avg"]) for p in state)


def test_the_optimizer_itself_pickles() -> None:
    model = adapt()
    optimizer = wrapped(model)
    train(model, optimizer, 3)
    again = pickle.loads(pickle.dumps(optimizer))
    assert isinstance(again, SpIELOptimizer)
    assert repr(again) == repr(optimizer)
    again.step()


def test_groups_state_and_defaults_are_those_of_the_wrapped_optimizer() -> None:
    model = adapt()
    optimizer = wrapped(model)
    base = optimizer.base_optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    extra = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert base.param_groups[1]["lr"] == 0.5
    assert repr(optimizer).startswith("SpIELOptimizer(AdamW")


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    model = adapt()
    optimizer = wrapped(model)
    loss_of(model, 1).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    for delta in deltas_of(model).values():
        assert (delta.values.grad is None) == set_to_none
        assert set_to_none or not delta.values.grad.any()


def test_hooks_on_the_wrapper_run_once_a_step() -> None:
    model = adapt()
    optimizer = wrapped(model)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(model, optimizer, 2)
    assert calls == ["pre", "post"] * 2


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused: bool) -> None:
    """A fused optimizer unscales and skips inside its kernel; the wrapper must pass scale and overflow on."""
    model = adapt()
    optimizer, scaler = wrapped(model, fused=fused), torch.amp.GradScaler("cpu", init_scale=256.0)
    for number in range(1, 8):
        for factor in (float("inf"), 1.0) if number in (1, 6) else (1.0,):
            scaler.scale(loss_of(model, number) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    other = adapt(total_steps=20)
    train(other, adamw(other, fused=fused), 7)
    assert_same_run(model, other)
    assert not hasattr(optimizer.base_optimizer, "found_inf")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(accumulate: int) -> None:
    runs = []
    for wrap in (True, False):
        model = adapt(total_steps=20)
        optimizer = wrapped(model) if wrap else adamw(model)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        prepared, stepper = accelerator.prepare(model, optimizer)
        for number in range(1, 7 * accumulate + 1):
            with accelerator.accumulate(prepared):
                accelerator.backward(loss_of(prepared, number))
                accelerator.clip_grad_norm_(trainable(prepared), 0.1)
                stepper.step()
                stepper.zero_grad()
        assert [report.step for report in log_of(model)] == [2, 6]
        runs.append(model)
    assert_same_run(*runs)


def test_around_an_accelerated_optimizer() -> None:
    model = adapt()
    accelerator = Accelerator(cpu=True)
    train(model, SpIELOptimizer(accelerator.prepare(adamw(model)), model, total_steps=20), 7)
    assert_same_run(model, reference())


def test_around_sm3() -> None:
    runs = []
    for wrap in (True, False):
        model = adapt(total_steps=20, growth="momentum")
        base = SM3(trainable(model), lr=0.01)
        train(model, SpIELOptimizer(base, model) if wrap else base, 7)
        runs.append(model)
    assert_same_run(*runs)
