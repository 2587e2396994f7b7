"""Schedules, clipping, loss scaling and closures around and inside an optimizer's step."""

from __future__ import annotations

import pytest
import torch
from support.adapters import deltas_of, log_of, trainable
from support.runs import adapt, assert_same_run, assert_sound, loss_of, train
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from optimizers.catalogue import EVERY, SHARED
from optimizers.runs import GROWTHS, STEPS, fresh, plain_run
from spiel_peft import SpIELOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

# Clipping


@pytest.mark.parametrize("growth", GROWTHS)
def test_candidates_do_not_change_the_gradient_norm(growth: str) -> None:
    """A trainer clips by the norm of the active deltas' gradients, with or without an open window."""
    norms = []
    for each in (growth, "none"):
        model = fresh(each)
        optimizer = EVERY["adamw"](trainable(model))
        norms.append([])
        for number in (1, 2, 3):
            loss_of(model, number).backward()
            norms[-1].append(float(nn.utils.clip_grad_norm_(trainable(model), 0.05)))
            optimizer.step()
            optimizer.zero_grad()
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert min(norms[0]) > 0.05


# Learning rates


@pytest.mark.parametrize(
    "name", ["adamw", "sgd-momentum", "adagrad", "adafactor", "transformers-adafactor", "bnb-lion"]
)
@pytest.mark.parametrize("kind", ["one-cycle", "cosine"])
def test_schedules(name: str, kind: str) -> None:
    """OneCycleLR also changes momentum or beta1; the values at the close count."""

    def made(optimizer: torch.optim.Optimizer) -> LRScheduler:
        if kind == "cosine":
            return CosineAnnealingLR(optimizer, T_max=40)
        momentum = name in ("adamw", "sgd-momentum")
        return OneCycleLR(optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=60, cycle_momentum=momentum)

    model = adapt(total_steps=60, density=0.4)
    optimizer = EVERY[name](trainable(model))
    schedule = made(optimizer)
    before, sizes = loss_of(model, 1).item(), {n: d.k for n, d in deltas_of(model).items()}
    for _ in range(40):
        train(model, optimizer, 1, first=1, after=lambda number: schedule.step())
    # Adafactor's steps are short: they are a share of the deltas' own size.
    assert loss_of(model, 1).item() < before * (1.0 if name == "adafactor" else 0.95)
    for module, delta in deltas_of(model).items():
        assert_sound(delta, sizes[module])
    assert len(log_of(model)) == 10


def test_an_optimizer_that_sets_its_own_rate() -> None:
    """Its group says lr=None; without a known length the rate of regrowth stays the initial one."""
    model = adapt()
    optimizer = EVERY["transformers-adafactor-own-lr"](trainable(model))
    assert optimizer.param_groups[0]["lr"] is None
    train(model, optimizer, STEPS)
    assert [report.rate for report in log_of(model)] == [1.0, 0.2]


# Loss scaling


@pytest.mark.parametrize(
    "name",
    [
        "adamw",
        "adamw-fused",
        "sgd-fused",
        "sgd-nesterov",
        "adagrad",
        "rprop",
        "transformers-adafactor",
        "bnb-adamw",
        "sm3",
    ],
)
@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("wrap", [False, True])
def test_an_overflow_inside_a_window_leaves_no_trace(name: str, growth: str, wrap: bool) -> None:
    """float16's GradScaler skips the steps before the 1st, 2nd and 6th; all three are in windows."""
    # torch's fused SGD leaves its momentum uninitialized if its very first step is skipped.
    bad_before = (2, 6) if name == "sgd-fused" else (1, 2, 6)
    model = fresh(growth)
    base = {**EVERY, **SHARED}[name](trainable(model))
    optimizer = SpIELOptimizer(base, model) if wrap else base
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for number in range(1, STEPS + 1):
        for overflow in (True, False) if number in bad_before else (False,):
            loss = loss_of(model, 50 if overflow else number)
            scaler.scale(loss * float("inf") if overflow else loss).backward()
            if number % 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert_same_run(model, plain_run(name, growth))


# Closures


@pytest.mark.parametrize(
    "name", ["adamw", "adamw-fused", "sgd-nesterov", "two-iterates", "adafactor", "bnb-adamw", "sm3"]
)
@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("keyword", [False, True])
def test_closures(name: str, growth: str, keyword: bool) -> None:
    model = fresh(growth)
    optimizer = {**EVERY, **SHARED}[name](trainable(model))
    losses = []
    for number in range(1, STEPS + 1):

        def closure(number: int = number) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            losses.append(loss.item())
            return loss

        optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert len(losses) == STEPS
    assert_same_run(model, plain_run(name, growth))


def test_clipping_inside_a_closure_reaches_the_candidates() -> None:
    """As in Lightning, the closure clips. The optimizer overwrites gradients, so the closure must tell the factor."""
    model, reference = fresh(), fresh()
    optimizer, other = EVERY["sgd-nesterov"](trainable(model)), EVERY["sgd-nesterov"](trainable(reference))
    for number in (1, 2):

        def closure(number: int = number) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, number)
            (loss * 8).backward()
            for p in trainable(model):
                p.grad /= 8
            nn.utils.clip_grad_norm_(trainable(model), 0.05)
            return loss

        optimizer.step(closure)
        loss_of(reference, number).backward()
        nn.utils.clip_grad_norm_(trainable(reference), 0.05)
        other.step()
        other.zero_grad()
    for ours, theirs in zip(deltas_of(model).values(), deltas_of(reference).values(), strict=True):
        assert torch.equal(ours.state.window.positions, theirs.state.window.positions)
        torch.testing.assert_close(ours.state.window.sums, theirs.state.window.sums)
