"""Training with closes: when cycles close, how many deltas each close replaces, and what never changes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.adapters import deltas_of, first_delta, indices_of, log_of, trainable
from support.models import mlp
from support.runs import adamw, adapt, assert_same_run, assert_sound, loss_of, moved, steps_with_moves, train

CRITERIA = ["accumulated_gradient", "momentum", "random"]


@pytest.mark.parametrize("growth", CRITERIA)
@pytest.mark.parametrize(("every", "first"), [(4, 2), (3, 3), (1, 1)])
def test_cycles_close_at_g_and_every_s_steps_after(growth: str, every: int, first: int) -> None:
    model = adapt(growth=growth, regrow_every=every, accumulation_steps=first, regrow_schedule="constant")
    seen = steps_with_moves(model, adamw(model), 11)
    expected = list(range(first, 12, every))
    assert [report.step for report in log_of(model)] == expected
    assert set(seen) <= set(expected)
    assert seen[0] == first


def test_offset_beyond_the_cycle_length_for_criteria_without_windows() -> None:
    model = adapt(growth="random", regrow_every=2, accumulation_steps=5)
    assert steps_with_moves(model, adamw(model), 10) == [5, 7, 9]


@pytest.mark.parametrize("growth", CRITERIA)
def test_first_close_of_a_fresh_run_replaces_the_random_start(growth: str) -> None:
    model = adapt(growth=growth, density=0.1, total_steps=40, initial_regrow_rate=0.3)
    train(model, adamw(model), 6)
    first, second = log_of(model)
    assert (first.step, first.rate) == (2, 1.0)
    assert (second.step, second.rate) == (6, pytest.approx(0.3 * (1 - 6 / 40)))
    assert first.churn > 0.7
    assert second.replaced <= sum(math.floor(second.rate * d.k) for d in deltas_of(model).values())


@pytest.mark.parametrize("growth", CRITERIA)
def test_first_close_of_nonzero_deltas_follows_the_schedule(growth: str) -> None:
    model = adapt(growth=growth, init_weights=False, density=0.3, total_steps=20)
    before = indices_of(model)
    train(model, adamw(model), 2)
    assert log_of(model)[0].rate == pytest.approx(0.2 * (1 - 2 / 20))
    for name, delta in deltas_of(model).items():
        assert moved(before[name], delta.indices) <= math.floor(0.2 * 0.9 * delta.k)


def saved(model: PeftModel, folder: Path, training_state: bool) -> None:
    model.save_pretrained(folder)
    if not training_state:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file({k: v for k, v in tensors.items() if ".spiel_delta.spiel_" not in k}, path)


@pytest.mark.parametrize("training_state", [True, False])
def test_train_save_load_train_on(tmp_path: Path, training_state: bool) -> None:
    """At most rate * k positions change at the first close, whether the run is continued or a new one begins."""
    model = adapt(density=0.3, total_steps=40)
    train(model, adamw(model), 5)
    saved(model, tmp_path, training_state)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True).train()
    before = indices_of(loaded)
    assert_same_run(model, loaded)
    close_after, step = (1, 6) if training_state else (2, 2)
    train(loaded, adamw(loaded), close_after, first=6)
    (report,) = log_of(loaded)
    assert (report.step, report.rate) == (step, pytest.approx(0.2 * (1 - step / 40)))
    for name, delta in deltas_of(loaded).items():
        assert moved(before[name], delta.indices) <= math.floor(report.rate * delta.k)


def test_none_never_closes() -> None:
    model = adapt(growth="none")
    assert steps_with_moves(model, adamw(model), 12) == []
    assert log_of(model) == []
    assert first_delta(model).state.window is None


def moves_by_criterion(growth: str, **fields: int) -> PeftModel:
    model = adapt(growth=growth, total_steps=30, **fields)
    train(model, adamw(model), 10)
    return model


@pytest.mark.parametrize("growth", CRITERIA)
def test_runs_are_reproducible(growth: str) -> None:
    first = moves_by_criterion(growth)
    torch.manual_seed(99)  # the cycle draws from no global generator
    assert_same_run(first, moves_by_criterion(growth))


def test_random_growth_depends_on_the_seed_and_draws_inactive_positions() -> None:
    a, b = moves_by_criterion("random", seed=1), moves_by_criterion("random", seed=2)
    assert any(moved(x, y) for x, y in zip(indices_of(a).values(), indices_of(b).values(), strict=True))
    model = adapt(growth="random", density=0.6)
    before = indices_of(model)
    train(model, adamw(model), 2)
    for name, delta in deltas_of(model).items():
        # All that was free is taken, nothing that was active was drawn again.
        assert moved(before[name], delta.indices) == delta.numel - delta.k


@pytest.mark.parametrize("growth", CRITERIA)
@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_invariants_hold_after_every_step(growth: str, density: float) -> None:
    model = adapt(growth=growth, density=density, regrow_every=2, regrow_schedule="constant")
    optimizer = adamw(model, fused=True)
    identity = [(delta, delta.k, delta.values, delta.indices) for delta in deltas_of(model).values()]
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}

    def check(number: int) -> None:
        for delta, k, values, indices in identity:
            assert delta.values is values
            assert delta.indices is indices
            assert_sound(delta, k)

    train(model, optimizer, 9, after=check)
    assert len(log_of(model)) == 4
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p.view(torch.int32), base[name].view(torch.int32)), name


def test_kept_deltas_are_untouched_by_a_close() -> None:
    """A close moves values, gradients and state together. With lr=0, only the close can change them."""
    model = adapt(init_weights=False, density=0.4, initial_regrow_rate=0.5, regrow_schedule="constant")
    optimizer = torch.optim.AdamW(trainable(model), lr=0.0, weight_decay=0.0)
    train(model, optimizer, 1)
    delta = first_delta(model)
    before = dict(zip(delta.indices.tolist(), delta.values.tolist(), strict=True))
    loss_of(model, 2).backward()
    gradients = dict(zip(delta.indices.tolist(), delta.values.grad.tolist(), strict=True))
    optimizer.step()
    kept = [p for p in delta.indices.tolist() if p in before]
    assert 0 < len(kept) < delta.k
    for slot, position in enumerate(delta.indices.tolist()):
        assert delta.values[slot].item() == before.get(position, 0.0)
        assert delta.values.grad[slot].item() == gradients.get(position, 0.0)


def test_too_late_closes_are_skipped() -> None:
    model = adapt(total_steps=12, stop_regrowing_at=0.5, initial_regrow_rate=1.0)
    train(model, adamw(model), 12)
    assert [report.step for report in log_of(model)] == [2, 6]
    assert first_delta(model).state.window is None


def test_wrong_total_steps_never_grow_past_the_end() -> None:
    model = adapt(total_steps=5)
    train(model, adamw(model), 12)
    assert [report.step for report in log_of(model)] == [2]


def test_stop_regrowing_needs_a_known_length_at_every_attempt() -> None:
    model = adapt(stop_regrowing_at=0.5)
    optimizer = adamw(model)
    loss_of(model, 1).backward()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"stop_regrowing_at=0\.5 .* total_steps"):
            optimizer.step()
    for delta in deltas_of(model).values():
        assert not delta.values.detach().any()
        assert delta.state.step == 0


@pytest.mark.parametrize(
    ("factors", "rates"),
    [
        ([1.0] * 10, [1.0, 0.2, 0.2]),
        # warmup to 1, then down: the highest so far counts
        ([0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.1], [1.0, 0.2 * 0.6, 0.2 * 0.1]),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], [1.0, 0.2, 0.2]),
    ],
)
def test_the_rate_follows_the_learning_rate_when_the_length_is_unknown(
    factors: list[float], rates: list[float]
) -> None:
    model = adapt()
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[min(step, 9)])
    train(model, optimizer, 10, after=lambda number: schedule.step())
    assert [report.rate for report in log_of(model)] == pytest.approx(rates)


def test_report_adds_up() -> None:
    model = adapt(total_steps=20)
    before = indices_of(model)
    train(model, adamw(model), 2)
    # What the deltas are before the close, the same run without one shows.
    reference = adapt(total_steps=20, growth="none")
    train(reference, adamw(reference), 2)
    (report,) = log_of(model)
    total = sum(d.k for d in deltas_of(model).values())
    expected = sum(float(d.values.detach().abs().sum()) for d in deltas_of(reference).values()) / total
    assert report.mean_abs_delta == pytest.approx(expected, rel=1e-6)
    assert report.replaced == sum(moved(before[name], d.indices) for name, d in deltas_of(model).items())
    assert report.kept == total - report.replaced
    assert report.churn == pytest.approx(report.replaced / total)
