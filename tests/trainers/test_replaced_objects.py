"""Trainers and PEFT replace an optimizer's group dicts and Parameter objects; the cycle keeps no old ones."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from support.adapters import deltas_of, log_of
from support.runs import adamw, adapt, assert_same_run, loss_of, train
from torch import nn

from spiel_peft import SpIELOptimizer

STEPS = 11
# Inside a window (steps 1-3, 5-7, 9-11), at a close, and between them.
MOMENTS = [1, 2, 3, 4, 5, 7]


def fresh() -> PeftModel:
    return adapt(total_steps=20, accumulation_steps=3, initial_regrow_rate=0.8)


def undisturbed() -> PeftModel:
    model = fresh()
    train(model, adamw(model), STEPS)
    assert [report.step for report in log_of(model)] == [3, 7, 11]
    assert sum(report.replaced for report in log_of(model)[1:]) > 0
    return model


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "SpIELOptimizer"])
def test_prepare_replaces_the_group_dicts(wrapped: bool) -> None:
    model = fresh()
    inner = adamw(model)
    optimizer = SpIELOptimizer(inner, model) if wrapped else inner
    before = inner.param_groups[0]
    ready, stepper = Accelerator(cpu=True).prepare(model, optimizer)
    assert inner.param_groups[0] is not before
    train(ready, stepper, STEPS)
    assert_same_run(model, undisturbed())


@pytest.mark.parametrize("at", MOMENTS)
def test_group_dicts_replaced_in_a_run(at: int) -> None:
    model = fresh()
    optimizer = adamw(model)
    train(model, optimizer, at)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, STEPS - at, first=at + 1)
    assert_same_run(model, undisturbed())


def replace_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """New Parameter objects in the model and the optimizer, as sharding makes them."""
    for delta in deltas_of(model).values():
        old, new = delta.values, nn.Parameter(delta.values.detach().clone())
        delta.values = new
        for group in optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)


@pytest.mark.parametrize("at", [0, *MOMENTS])
def test_parameters_replaced_in_a_run(at: int) -> None:
    model = fresh()
    optimizer = adamw(model)
    train(model, optimizer, at)
    replace_parameters(model, optimizer)
    train(model, optimizer, STEPS - at, first=at + 1)
    assert_same_run(model, undisturbed())


def test_parameters_replaced_between_backward_and_step() -> None:
    """The gradients move to the new Parameter objects; the base weights are unchanged."""
    model = fresh()
    optimizer = adamw(model)
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    for number in range(1, STEPS + 1):
        loss_of(model, number).backward()
        grads = [delta.values.grad for delta in deltas_of(model).values()]
        replace_parameters(model, optimizer)
        for delta, grad in zip(deltas_of(model).values(), grads, strict=True):
            delta.values.grad = grad
        optimizer.step()
        optimizer.zero_grad()
    assert_same_run(model, undisturbed())
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, base[name]), name


def test_loading_half_precision_deltas_in_a_run_keeps_the_objects(tmp_path: Path) -> None:
    """PEFT alone would make new Parameter objects, which the optimizer does not have."""
    model = adapt(total_steps=20, delta_dtype="bfloat16")
    optimizer = adamw(model)
    train(model, optimizer, 3)
    model.save_pretrained(tmp_path)
    objects = {name: delta.values for name, delta in deltas_of(model).items()}
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(delta.values is objects[name] for name, delta in deltas_of(model).items())
    assert {delta.values.dtype for delta in deltas_of(model).values()} == {torch.bfloat16}
    train(model, optimizer, 7, first=4)
    assert [report.step for report in log_of(model)] == [2, 6, 10]
