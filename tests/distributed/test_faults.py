"""Faults on one rank: a step that is not finite counts on no rank, and a difference between ranks stops all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from support.adapters import deltas_of
from support.ranks import Raised, launch, results_of, run_here
from support.runs import adapt, registered_criteria
from torch import Tensor, nn

import spiel_peft.cycle.agreement as agreement
from distributed.runs import FIELDS, Training, assert_equal, assert_lockstep, own_batch
from spiel_peft import GrowthRequest, register_growth_criterion

RANKS, STEPS = 2, 7
GROWTHS = ["accumulated_gradient", "momentum"]
# Closes at 2 and 6. The first window's proposing step, its last one, and of the second: proposing, opening, closing.
BAD_BEFORE = [1, 2, 4, 5, 6]
Snapshots = list[dict[str, Tensor]]


# Steps that are not finite


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """SGD without momentum: after the values are restored, only the cycle could keep something of a bad step."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def undisturbed(rank: int, growth: str) -> Snapshots:
    return Training(rank, growth=growth, optimizer=plain_sgd, clip=None).run(STEPS)


def not_finite(rank: int, growth: str, bad_before: int, value: float) -> Snapshots:
    """The loss of one extra step is not finite on rank 1; no trainer skips that step, and the loop undoes it."""
    training = Training(rank, growth=growth, optimizer=plain_sgd, clip=None)
    out = []
    for number in range(1, STEPS + 1):
        if number == bad_before:
            kept = {delta: delta.values.detach().clone() for delta in deltas_of(training.model).values()}
            x, y = own_batch(rank, 50)
            ((training.parallel(x) - y).square().mean() * (value if rank == 1 else 1.0)).backward()
            with pytest.raises(FloatingPointError):
                training.optimizer.step()
            training.optimizer.zero_grad()
            for delta, values in kept.items():
                delta.values.data.copy_(values)
        out.append(training.step(number))
    return out


def scaled(rank: int, bad_before: int, fused: bool) -> Snapshots:
    """The same with a GradScaler, which skips the step."""
    training = Training(rank, optimizer=partial(fused_adamw, fused=fused), clip=None)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    out = []

    def one(number: int, factor: float = 1.0) -> None:
        x, y = own_batch(rank, number)
        scaler.scale((training.parallel(x) - y).square().mean() * factor).backward()
        scaler.step(training.optimizer)
        scaler.update()
        training.optimizer.zero_grad()

    for number in range(1, STEPS + 1):
        if number == bad_before:
            one(50, math.inf if rank == 1 else 1.0)
        one(number)
        out.append(training.snapshot())
    return out


def fused_adamw(model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=fused)


def scaled_undisturbed(rank: int, fused: bool) -> Snapshots:
    return Training(rank, optimizer=partial(fused_adamw, fused=fused), clip=None).run(STEPS)


def overflow_among_candidates(rank: int, bad: int) -> Snapshots:
    """Only a candidate's gradient overflows, on rank 1, so the trainer does not skip the step."""
    training = Training(rank)
    out = []
    for number in range(1, STEPS + 1):
        training.backward(number)
        if number == bad and rank == 1:
            deltas_of(training.model)["0"].state.current.pending[3] = math.inf
        training.optimizer.step()
        training.optimizer.zero_grad()
        out.append(training.snapshot())
    return out


# Differences


def tampered(rank: int, change: Callable[[Training], None], at: int = 3) -> int:
    """Change something on rank 1 after step `at`; returns the steps that were taken before the error."""
    training = Training(rank)
    for number in range(1, STEPS + 1):
        training.step(number)
        if number == at and rank == 1:
            change(training)
    return STEPS


def change_values(training: Training) -> None:
    deltas_of(training.model)["2"].values.data[3] += 1e-3


def change_learning_rate(training: Training) -> None:
    training.optimizer.param_groups[0]["lr"] *= 1.1


def change_moments(training: Training) -> None:
    for delta in deltas_of(training.model).values():
        training.optimizer.state[delta.values]["exp_avg"].mul_(2)


def change_total_steps(training: Training) -> None:
    deltas_of(training.model)["0"].run.total_steps = 19


def change_steps(training: Training) -> None:
    for delta in deltas_of(training.model).values():
        delta.state.step += 1


def differs_late(rank: int) -> None:
    """Ranks still compare their state after the last close, at the steps where a close would have been."""
    training = Training(rank, stop_regrowing_at=0.2)
    for number in range(1, 11):
        training.step(number)
        if number == 7 and rank == 1:
            change_values(training)


def differs_from_the_start(rank: int, **fields: Any) -> None:
    Training(rank, **{name: values[rank] for name, values in fields.items()}).run(STEPS)


def loaded_on_one_rank(rank: int) -> None:
    """A wrapper broadcasts parameters and buffers when it is built, but not the step count of a run."""
    first = Training(rank)
    first.run(3)
    model = adapt(**FIELDS)
    if rank == 0:
        set_peft_model_state_dict(model, get_peft_model_state_dict(first.model))
    Training(rank, model=model).step(4)


def decides_otherwise(rank: int) -> int:
    """Rank 1 makes another decision at a close."""
    real = agreement.exchanges

    def reversed_decision(*args: Any) -> list[Tensor]:
        return [incoming.flip(0) for incoming in real(*args)]

    training = Training(rank)
    training.run(4)
    if rank == 1:
        agreement.exchanges = reversed_decision
    try:
        for number in (5, 6):
            training.step(number)
    finally:
        agreement.exchanges = real
    return 6


def with_criterion(rank: int, propose: Callable[[GrowthRequest], Tensor]) -> Snapshots:
    with registered_criteria():
        register_growth_criterion("of_this_test", propose)
        return Training(rank, growth="of_this_test").run(STEPS)


def fails_on_rank_1(request: GrowthRequest) -> Tensor:
    if torch.distributed.get_rank() == 1:
        raise OSError("no more luck")
    return torch.arange(request.count)


def repeats_on_rank_0(request: GrowthRequest) -> Tensor:
    repeated = torch.distributed.get_rank() == 0
    return torch.zeros(2, dtype=torch.int64) if repeated else torch.arange(request.count)


def draws_from_elsewhere(request: GrowthRequest) -> Tensor:
    """A growth criterion violates its contract: it grows other positions on every rank, and another number."""
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(rank + 1000 * int(request.indices.sum()))
    return torch.randperm(request.numel, generator=generator)[: request.count + 5 * rank]


NAN, INF = math.nan, math.inf
NOT_FINITE = [(growth, bad, NAN) for growth in GROWTHS for bad in BAD_BEFORE] + [(GROWTHS[0], 5, INF)]
TAMPERED: dict[str, tuple[Any, str]] = {
    "values": (change_values, r"step 6: the values of module '2' on ranks \[1\] differ from rank 0's\."),
    "learning rate": (change_learning_rate, r"step 6: the values of module '0' on ranks \[1\].*and 1 more modules"),
    "moments": (change_moments, r"the values of module '0' on ranks \[1\] differ"),
    "total_steps": (change_total_steps, r"disagree on total_steps \(20 on rank 0, 19 on rank 1\).*pass the same"),
    "steps": (change_steps, r"disagree on optimizer steps so far \(3 on rank 0, 4 on rank 1\)"),
}
FROM_THE_START: dict[str, tuple[dict[str, Any], str]] = {
    "total_steps": ({"total_steps": (20, 21)}, r"total_steps \(20 on rank 0, 21 on rank 1\)"),
    "seed": ({"seed": (0, 1)}, "the adapter's settings or its training state"),
    "schedule": ({"regrow_schedule": ("linear", "cosine")}, "the adapter's settings"),
}
SCENARIOS = {
    **{f"undisturbed, {growth}": partial(undisturbed, growth=growth) for growth in GROWTHS},
    **{
        f"not finite, {growth}, {bad}, {value}": partial(not_finite, growth=growth, bad_before=bad, value=value)
        for growth, bad, value in NOT_FINITE
    },
    **{f"scaled, {fused}": partial(scaled_undisturbed, fused=fused) for fused in (False, True)},
    **{
        f"scaled, {fused}, {bad}": partial(scaled, bad_before=bad, fused=fused)
        for fused in (False, True)
        for bad in BAD_BEFORE
    },
    **{f"overflow, {bad}": partial(overflow_among_candidates, bad=bad) for bad in (1, 4, 5)},
    **{f"tampered, {name}": partial(tampered, change=change) for name, (change, _) in TAMPERED.items()},
    **{f"start, {name}": partial(differs_from_the_start, **fields) for name, (fields, _) in FROM_THE_START.items()},
    "after regrowth": differs_late,
    "loaded on one rank": loaded_on_one_rank,
    "decision": decides_otherwise,
    "criterion fails": partial(with_criterion, propose=fails_on_rank_1),
    "criterion repeats": partial(with_criterion, propose=repeats_on_rank_0),
    "criterion draws": partial(with_criterion, propose=draws_from_elsewhere),
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return launch(__file__, tmp_path_factory.mktemp("faults"), RANKS)


def errors_of(launched: dict[str, list[Any]], name: str) -> list[Raised]:
    for result in launched[name]:
        assert isinstance(result, Raised), name
        assert result.kind != "apart", result.trace
    return launched[name]


@pytest.mark.parametrize(("growth", "bad", "value"), NOT_FINITE)
def test_a_step_that_is_not_finite_on_one_rank_counts_on_none(
    launched: dict[str, list[Any]], growth: str, bad: int, value: float
) -> None:
    by_rank = results_of(launched, f"not finite, {growth}, {bad}, {value}")
    assert_lockstep(by_rank)
    assert_equal([by_rank[0][-1], results_of(launched, f"undisturbed, {growth}")[0][-1]])
    assert (by_rank[0][-1]["replaced"] > 0).all()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", BAD_BEFORE)
def test_a_step_that_scalers_skip_leaves_no_trace(launched: dict[str, list[Any]], fused: bool, bad: int) -> None:
    by_rank = results_of(launched, f"scaled, {fused}, {bad}")
    assert_lockstep(by_rank)
    reference = results_of(launched, f"scaled, {fused}")[0][-1]
    for key, tensor in by_rank[0][-1].items():
        # Scales are powers of two, but the scaler halves what an overflow showed to be too much.
        torch.testing.assert_close(tensor, reference[key], rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("bad", [1, 4, 5])
def test_an_overflow_among_one_ranks_candidates_poisons_no_window(launched: dict[str, list[Any]], bad: int) -> None:
    by_rank = results_of(launched, f"overflow, {bad}")
    assert_lockstep(by_rank)
    for snapshot in by_rank[0]:
        for key, tensor in snapshot.items():
            assert torch.isfinite(tensor.double()).all(), key
    assert (by_rank[0][-1]["replaced"] > 0).all()


@pytest.mark.parametrize("name", TAMPERED)
def test_a_difference_stops_all_ranks(launched: dict[str, list[Any]], name: str) -> None:
    for error in errors_of(launched, f"tampered, {name}"):
        assert error.kind == "RuntimeError"
        assert re.search(TAMPERED[name][1], error.message), error.message


@pytest.mark.parametrize("name", FROM_THE_START)
def test_different_settings_are_refused_at_the_first_step(launched: dict[str, list[Any]], name: str) -> None:
    for error in errors_of(launched, f"start, {name}"):
        assert re.search(FROM_THE_START[name][1], error.message), error.message


def test_differences_are_found_after_the_last_close_too(launched: dict[str, list[Any]]) -> None:
    for error in errors_of(launched, "after regrowth"):
        assert re.search(r"step 10: the values of module '2' on ranks \[1\]", error.message), error.message


def test_a_checkpoint_loaded_on_one_rank_only(launched: dict[str, list[Any]]) -> None:
    for error in errors_of(launched, "loaded on one rank"):
        assert "disagree on optimizer steps so far (3 on rank 0, 0 on rank 1)" in error.message
        assert "load the same checkpoint" in error.message


def test_another_decision_on_one_rank(launched: dict[str, list[Any]]) -> None:
    for error in errors_of(launched, "decision"):
        assert re.search(r"step 6: the decision what to prune.*of module '0' on ranks \[1\] differs", error.message)


def test_a_criterion_that_fails_on_one_rank_stops_both(launched: dict[str, list[Any]]) -> None:
    first, second = errors_of(launched, "criterion fails")
    assert "growth criterion 'of_this_test' failed on ranks [1]" in first.message
    assert (second.kind, second.message) == ("OSError", "no more luck")
    first, second = errors_of(launched, "criterion repeats")
    assert first.kind == "ValueError" and "more than once" in first.message
    assert "failed on ranks [0]" in second.message


def test_a_criterion_that_ranks_compute_differently_is_the_first_ranks(launched: dict[str, list[Any]]) -> None:
    by_rank = results_of(launched, "criterion draws")
    assert_lockstep(by_rank)
    assert (by_rank[0][-1]["replaced"] > 0).all()


if __name__ == "__main__":
    run_here(SCENARIOS, RANKS)
