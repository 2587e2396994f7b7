"""Ranks choose the same candidates as one process with all the data."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from support.adapters import deltas_of, log_of, trainable
from support.models import mlp
from support.ranks import launch, results_of, run_here
from support.runs import adapt, batch
from torch import Tensor, nn

from distributed.runs import FIELDS, Training, impose, mean_square, snapshot
from spiel_kernels import stable_topk
from spiel_peft.cycle.window import NO_POSITION, padded, unite

RANKS, STEPS = 2, 15
DOUBLE = torch.float64
# The ranks' losses differ in size, so that their gradients do.
WEIGHTS = (1.0, 5.0)


# Pure functions


def test_the_union_of_proposals_and_its_sums() -> None:
    positions = torch.tensor([[3, 8, NO_POSITION], [1, 8, 9], [NO_POSITION] * 3], dtype=torch.int32)
    gradients = torch.tensor([[1.0, 2.0, 7.0], [4.0, -5.0, 6.0], [7.0, 7.0, 7.0]])
    union, sums = unite(positions, gradients)
    assert union.tolist() == [1, 3, 8, 9]
    assert sums.tolist() == [4.0, 1.0, -3.0, 6.0]


def test_a_union_of_no_proposals_is_empty() -> None:
    union, sums = unite(torch.full((3, 4), NO_POSITION), torch.zeros(3, 4))
    assert union.numel() == sums.numel() == 0


def test_stable_topk_settles_ties_by_place() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
    assert stable_topk(scores, 4).tolist() == [1, 2, 3, 4]
    assert stable_topk(scores, 9).tolist() == [0, 1, 2, 3, 4, 5]


def test_padding() -> None:
    assert padded(torch.tensor([5, 6]), 4, NO_POSITION).tolist() == [5, 6, NO_POSITION, NO_POSITION]


# On two ranks


def doubles(rank: int, **settings: Any) -> Training:
    return Training(rank, base=mlp(DOUBLE), **settings)


def weighted_loss(model: nn.Module, rank: int, number: int, size: int = 12) -> Tensor:
    return WEIGHTS[rank] * mean_square(model, batch(100 * rank + number, size, DOUBLE))


def dense_gradients(training: Training, number: int, size: int) -> dict[str, Tensor]:
    """The dense weight gradients of this rank, by autograd on a model without adapter."""
    plain = copy.deepcopy(training.model).merge_and_unload().requires_grad_(True)
    weighted_loss(plain, training.rank, number, size).backward()
    return {name: plain.get_submodule(name).weight.grad.flatten() for name in deltas_of(training.model)}


def plain_step(training: Training, number: int, size: int = 12) -> None:
    weighted_loss(training.parallel, training.rank, number, size).backward()
    if training.clip is not None:
        torch.nn.utils.clip_grad_norm_(trainable(training.model), training.clip)
    training.optimizer.step()
    training.optimizer.zero_grad()


def first_candidates(model: nn.Module) -> dict[str, Tensor]:
    """Every third position, as an arbitrary choice of candidates."""
    return {name: torch.arange(0, delta.numel, 3)[: delta.k] for name, delta in deltas_of(model).items()}


def windows_of(model: nn.Module) -> dict[str, Tensor]:
    deltas = deltas_of(model).items()
    return {name: delta.state.window.positions.clone() for name, delta in deltas if delta.state.window is not None}


def with_half_the_data(rank: int, growth: str) -> dict[str, Any]:
    training = doubles(rank, growth=growth)
    before, after = [], []
    if growth == "accumulated_gradient":
        impose(training.model, first_candidates(training.model))
    for number in range(1, STEPS + 1):
        before.append(windows_of(training.model))
        plain_step(training, number)
        after.append(training.snapshot())
    return {"before": before, "after": after, "log": [report.replaced for report in log_of(training.model)]}


def choosing(rank: int, size: int, **settings: Any) -> dict[str, Any]:
    """Dense gradients and candidates, step by step."""
    training = doubles(rank, **settings)
    out: dict[str, Any] = {"gradients": [], "windows": [], "k": {n: d.k for n, d in deltas_of(training.model).items()}}
    for number in range(1, STEPS + 1):
        out["gradients"].append(dense_gradients(training, number, size))
        plain_step(training, number, size)
        out["windows"].append(windows_of(training.model))
    return out


def sums_of_all_entries(rank: int) -> dict[str, Tensor]:
    """With every entry active, the candidates' sums have to be those of ``p.grad``, whatever happened to it."""
    training = doubles(rank, density=1.0, accumulation_steps=3, micro_batches=2, no_sync=True)
    delta = deltas_of(training.model)["0"]
    total = torch.zeros(delta.k, dtype=DOUBLE)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for number in (1, 2):
        for micro, context in enumerate((training.parallel.no_sync(), torch.enable_grad())):
            with context:
                scaler.scale(weighted_loss(training.parallel, rank, number + 50 * micro)).backward()
        scaler.unscale_(training.optimizer)
        torch.nn.utils.clip_grad_norm_(trainable(training.model), 0.01)
        total += delta.values.grad
        scaler.step(training.optimizer)
        scaler.update()
        training.optimizer.zero_grad()
    return {"sums": delta.state.window.sums, "expected": total}


GROWTHS = ["accumulated_gradient", "momentum", "random"]
SCENARIOS = {
    **{f"half the data, {growth}": partial(with_half_the_data, growth=growth) for growth in GROWTHS},
    "choosing": partial(choosing, size=12),
    "choosing few": partial(choosing, size=12, candidates=2, initial_regrow_rate=0.2, total_steps=None),
    "choosing from much data": partial(choosing, size=400),
    "all entries": sums_of_all_entries,
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return launch(__file__, tmp_path_factory.mktemp("candidates"), RANKS)


@pytest.mark.parametrize("growth", GROWTHS)
def test_given_the_same_candidates_the_choice_is_that_of_one_process(
    launched: dict[str, list[Any]], growth: str
) -> None:
    ours = results_of(launched, f"half the data, {growth}")[0]
    model = adapt(mlp(DOUBLE), **{**FIELDS, "growth": growth})
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    for number, (before, after) in enumerate(zip(ours["before"], ours["after"], strict=True), start=1):
        if before and not windows_of(model):
            impose(model, before)
        loss = sum(weighted_loss(model, rank, number) for rank in range(RANKS)) / RANKS
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable(model), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        expected = snapshot(model, optimizer)
        # Ranks open a window one step early, without sums.
        assert expected.keys() <= after.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(after[key], tensor, rtol=1e-9, atol=1e-12, msg=f"step {number}, {key}")
    assert len(ours["log"]) == 4
    assert min(ours["log"]) > 0


def test_shortlist_is_the_union_and_candidates_its_best(launched: dict[str, list[Any]]) -> None:
    """Closes are at 2, 6, 10 and 14: proposals in steps 4, 8, 12, windows open in 5, 9, 13."""
    by_rank = results_of(launched, "choosing")
    for opening in (5, 9, 13):
        for name, k in by_rank[0]["k"].items():
            own = [torch.topk(run["gradients"][opening - 2][name].abs(), k).indices for run in by_rank]
            union = torch.unique(torch.cat(own))
            sums = sum(run["gradients"][opening - 1][name] for run in by_rank)
            best = union[torch.topk(sums[union].abs(), k).indices].sort().values
            for run in by_rank:
                assert run["windows"][opening - 2][name].tolist() == union.tolist()
                assert run["windows"][opening - 1][name].tolist() == best.tolist()


def test_ranks_propose_as_many_as_the_close_can_grow(launched: dict[str, list[Any]]) -> None:
    by_rank = results_of(launched, "choosing few")
    for opening in (5, 9, 13):
        for name, k in by_rank[0]["k"].items():
            few = 2 * int(0.2 * k)
            own = [torch.topk(run["gradients"][opening - 2][name].abs(), few).indices for run in by_rank]
            for run in by_rank:
                assert run["windows"][opening - 2][name].tolist() == torch.unique(torch.cat(own)).tolist()


def test_the_first_window_chooses_by_what_ranks_propose(launched: dict[str, list[Any]]) -> None:
    by_rank = results_of(launched, "choosing")
    for name, k in by_rank[0]["k"].items():
        own = [torch.topk(run["gradients"][0][name].abs(), k).indices for run in by_rank]
        assert by_rank[0]["windows"][0][name].tolist() == torch.unique(torch.cat(own)).tolist()
        assert by_rank[1]["windows"][0][name].tolist() == by_rank[0]["windows"][0][name].tolist()


def test_candidates_of_two_ranks_overlap_with_the_exact_ones_more_than_those_of_one(
    launched: dict[str, list[Any]],
) -> None:
    """The k positions with the largest summed gradient of both ranks in the opening step."""
    by_rank = results_of(launched, "choosing from much data")
    together, alone, total = 0, 0, 0
    for opening in (5, 9, 13):
        for name, k in by_rank[0]["k"].items():
            exact = torch.topk(sum(run["gradients"][opening - 1][name] for run in by_rank).abs(), k).indices
            first = torch.topk(by_rank[0]["gradients"][opening - 1][name].abs(), k).indices
            together += int(torch.isin(by_rank[0]["windows"][opening - 1][name], exact).sum())
            alone += int(torch.isin(first, exact).sum())
            total += k
    print(f"overlap with the exact top k: {together / total:.2f} together, {alone / total:.2f} by the first rank alone")
    assert together > alone
    assert together > 0.7 * total


def test_sums_are_those_of_the_averaged_gradient(launched: dict[str, list[Any]]) -> None:
    for result in results_of(launched, "all entries"):
        torch.testing.assert_close(result["sums"], result["expected"], rtol=1e-9, atol=1e-14)


if __name__ == "__main__":
    run_here(SCENARIOS, RANKS)
