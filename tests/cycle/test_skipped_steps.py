"""Skipped optimizer steps, and factors between the gradients of the backward pass and those of the optimizer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.adapters import deltas_of, first_delta, log_of, trainable
from support.models import mlp
from support.runs import adamw, adapt, assert_same_run, loss_of, train
from torch import Tensor, nn

STEPS = 7
GROWTHS = ["accumulated_gradient", "momentum"]
# With windows of three steps before the closes at 3 and 7: opening, middle and last step of both.
BAD_BEFORE = [1, 2, 3, 5, 6, 7]
BAD_BATCH = 50


def fresh(growth: str = "accumulated_gradient") -> PeftModel:
    return adapt(growth=growth, accumulation_steps=3, density=0.3, total_steps=20, initial_regrow_rate=0.8)


def undisturbed(growth: str, fused: bool = False) -> PeftModel:
    model = fresh(growth)
    train(model, adamw(model, fused=fused), STEPS)
    assert [report.step for report in log_of(model)] == [3, 7]
    assert log_of(model)[1].replaced > 0
    return model


class Scaled:
    """A training loop with a GradScaler, whose scales are powers of two, so that scaling is exact."""

    def __init__(self, model: PeftModel, fused: bool, clip: float | None = None, none: bool = True) -> None:
        self.model, self.clip, self.none = model, clip, none
        self.elsewhere = nn.Parameter(torch.ones(()))
        self.optimizer = torch.optim.AdamW([*trainable(model), self.elsewhere], lr=0.01, fused=fused)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)

    def step(self, loss: Tensor) -> None:
        self.scaler.scale(loss + 0 * self.elsewhere).backward()
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(trainable(self.model), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=self.none)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("where", ["here", "elsewhere"])
@pytest.mark.parametrize("bad_before", BAD_BEFORE)
def test_steps_that_a_grad_scaler_skips_leave_no_trace(fused: bool, where: str, bad_before: int) -> None:
    model = fresh()
    loop = Scaled(model, fused)
    for number in range(1, STEPS + 1):
        if number == bad_before:
            # Another batch, so that the candidates it would choose are others.
            loss = loss_of(model, BAD_BATCH)
            loop.step(loss * float("inf") if where == "here" else loss + 3e38 * loop.elsewhere)
        loop.step(loss_of(model, number))
    assert_same_run(model, undisturbed("accumulated_gradient", fused))


@pytest.mark.parametrize("fused", [False, True])
def test_momentum_growth_ignores_skipped_steps(fused: bool) -> None:
    model = fresh("momentum")
    loop = Scaled(model, fused)
    for number in range(1, STEPS + 1):
        loop.step(loss_of(model, BAD_BATCH) * float("nan"))
        loop.step(loss_of(model, number))
    reference = undisturbed("momentum", fused)
    assert_same_run(model, reference)
    for ours, theirs in zip(deltas_of(model).values(), deltas_of(reference).values(), strict=True):
        assert torch.equal(ours.state.row, theirs.state.row)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("none", [False, True])
def test_candidates_get_the_unscaling_and_clipping_of_the_active_deltas(fused: bool, none: bool) -> None:
    model, reference = fresh(), fresh()
    loop, optimizer = Scaled(model, fused, clip=0.02, none=none), adamw(reference, fused=fused)
    for number in range(1, 3):
        loop.step(loss_of(model, number))
        loss = loss_of(reference, number)
        loss.backward()
        assert nn.utils.clip_grad_norm_(trainable(reference), 0.02) > 0.1
        optimizer.step()
        optimizer.zero_grad(set_to_none=none)
    for ours, theirs in zip(deltas_of(model).values(), deltas_of(reference).values(), strict=True):
        assert torch.equal(ours.state.window.positions, theirs.state.window.positions)
        assert ours.state.window.sums.abs().max() < 0.04
        torch.testing.assert_close(ours.state.window.sums, theirs.state.window.sums)
        torch.testing.assert_close(ours.state.window.squares, theirs.state.window.squares)


def test_candidate_gradients_are_those_of_a_dense_matrix() -> None:
    """If every entry is active, the sums of candidates' gradients equal the sums of p.grad."""
    model = adapt(density=1.0, accumulation_steps=3)
    delta, total = first_delta(model), torch.zeros(60)
    optimizer = adamw(model)
    for number in (1, 2):
        loss_of(model, number).backward()
        nn.utils.clip_grad_norm_(trainable(model), 0.01)
        total += delta.values.grad
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(delta.state.window.sums, total)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table, self.head = nn.Embedding(30, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x)))


def test_untouched_rows_do_not_hide_the_factor() -> None:
    """If all gradients of one matrix are zero, the trainer's factor is read from the other matrices."""

    def table_window(scaled: bool) -> Tensor:
        model = adapt(Table(), target_modules=["table", "head"], accumulation_steps=3)
        delta = deltas_of(model)["table"]
        delta.indices.copy_(torch.arange(delta.k))
        x = torch.arange(delta.k // 4 + 1, 30)
        loop, optimizer = Scaled(model, False), adamw(model)
        for _ in range(2):
            loss = model(x).square().sum()
            if scaled:
                loop.step(loss)
            else:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert not delta.values.detach().any()
        return delta.state.window.sums

    torch.testing.assert_close(table_window(True), table_window(False))


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("none", [False, True])
@pytest.mark.parametrize("bad_before", BAD_BEFORE)
def test_gradients_thrown_away_do_not_count(growth: str, none: bool, bad_before: int) -> None:
    model = fresh(growth)
    optimizer = adamw(model)

    def one(number: int) -> None:
        if number == bad_before:
            for _ in range(2):
                loss_of(model, BAD_BATCH).backward()
            optimizer.zero_grad(set_to_none=none)
        loss_of(model, number).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=none)

    for number in range(1, STEPS + 1):
        one(number)
    assert_same_run(model, undisturbed(growth))


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_gradients_without_a_scaler_do_not_count(growth: str, value: float) -> None:
    """SGD without momentum and with lr 0 keeps nothing of a step that is not finite, nor may the cycle."""

    def run(bad_before: int | None) -> PeftModel:
        model = fresh(growth)
        optimizer = torch.optim.SGD(trainable(model), lr=0.05)
        for number in range(1, STEPS + 1):
            if number == bad_before:
                values = [delta.values.detach().clone() for delta in deltas_of(model).values()]
                (loss_of(model, BAD_BATCH) * value).backward()
                with pytest.raises(FloatingPointError):
                    optimizer.step()
                optimizer.zero_grad()
                for delta, before in zip(deltas_of(model).values(), values, strict=True):
                    delta.values.data.copy_(before)
            loss_of(model, number).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    reference = run(None)
    assert log_of(reference)[1].replaced > 0
    for bad_before in BAD_BEFORE:
        assert_same_run(run(bad_before), reference)


@pytest.mark.parametrize("bad", [1, 2])
def test_an_overflow_among_candidates_alone_does_not_poison_the_window(bad: int) -> None:
    model = fresh()
    optimizer = adamw(model)
    delta = first_delta(model)
    for number in (1, 2, 3):
        loss_of(model, number).backward()
        if number == bad:
            delta.state.current.pending[4] = float("inf")
        optimizer.step()
        if number == 2:
            assert delta.state.window.steps == 1
            assert torch.isfinite(delta.state.window.sums).all()
        optimizer.zero_grad()
    assert log_of(model)[0].replaced > 0


def test_a_first_backward_without_gradient_opens_no_window() -> None:
    """A cycle finds its candidates although the window's first backward pass has no gradients, as without labels."""
    model = fresh()
    optimizer = adamw(model)
    (loss_of(model, 1) * 0).backward()
    assert first_delta(model).state.window is None
    loss_of(model, 1).backward()
    assert first_delta(model).state.window is not None
    optimizer.step()


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_micro_batches_make_one_gradient_per_step(micro_batches: int) -> None:
    """Data in one batch or in several micro-batches gives the same sums, whichever matrix opens its window first."""

    def window(pieces: int) -> Tensor:
        model = adapt(density=1.0, accumulation_steps=3)
        optimizer = adamw(model)
        for number in (1, 2):
            for _ in range(pieces):
                (loss_of(model, number) / pieces).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert first_delta(model).state.window.steps == 2
        return first_delta(model).state.window.squares

    torch.testing.assert_close(window(micro_batches), window(1))


@pytest.mark.parametrize("growth", [*GROWTHS, "random", "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_ruins_deltas_says_so_at_once(growth: str, value: float, tmp_path: Path) -> None:
    """The modules are named, the adapter is not saved, and the last checkpoint resumes as if nothing had been."""
    expected, model = fresh(growth), fresh(growth)
    train(expected, adamw(expected), STEPS)
    optimizer = adamw(model)
    train(model, optimizer, 4)
    model.save_pretrained(tmp_path / "good")
    states = copy.deepcopy(optimizer.state_dict())
    (loss_of(model, BAD_BATCH) * value).backward()
    with pytest.raises(FloatingPointError, match="(?s)NaN or infinite.*'0', '2'.*resume from the last checkpoint"):
        optimizer.step()
    with pytest.raises(ValueError, match="(?s)NaN or infinite.*'0'"):
        model.save_pretrained(tmp_path / "bad")
    assert not list((tmp_path / "bad").glob("*.safetensors"))
    resumed = PeftModel.from_pretrained(mlp(), tmp_path / "good", is_trainable=True).train()
    optimizer = adamw(resumed)
    optimizer.load_state_dict(states)
    train(resumed, optimizer, STEPS - 4, first=5)
    assert_same_run(resumed, expected)


def test_one_ruined_module_is_the_one_that_is_named() -> None:
    model = fresh()
    optimizer = adamw(model)
    train(model, optimizer, 1)
    loss_of(model, 2).backward()
    deltas_of(model)["2"].values.grad[3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"1 of 2 modules NaN or infinite \('2'\)"):
        optimizer.step()


def test_deltas_that_overflow_at_finite_gradients_are_found_at_the_close() -> None:
    model = fresh("momentum")
    optimizer = torch.optim.SGD(trainable(model), lr=1e30)
    with pytest.raises(FloatingPointError, match="learning rate"):
        for number in range(1, 4):
            (loss_of(model, 1) if number == 1 else sum(p.sum() for p in trainable(model)) * 1e10).backward()
            optimizer.step()
            optimizer.zero_grad()
