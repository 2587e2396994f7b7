"""Growth criteria in training: candidates of embeddings, criteria that users register, and errors of criteria."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.adapters import deltas_of, first_delta, indices_of, trainable
from support.runs import adamw, adapt, assert_sound, loss_of, registered_criteria, train
from torch import Tensor, nn

from spiel_peft import GrowthRequest, PruneRequest, get_growth_criterion, register_growth_criterion


class Table(nn.Module):
    """A model with an embedding, of whose many rows each batch uses only a few."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


def test_embedding_grows_in_used_rows_only() -> None:
    torch.manual_seed(0)
    model = adapt(Table(), target_modules=["table"], density=0.2, regrow_schedule="constant")
    delta, start = first_delta(model), indices_of(model)["table"]
    optimizer = adamw(model)
    for _ in range(6):
        model(torch.tensor([3, 4, 5])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_sound(delta, 48)
    grown = delta.indices[~torch.isin(delta.indices, start)]
    used = torch.tensor([3, 4, 5])
    assert torch.isin(grown // 6, used).all()
    # 18 positions got gradients: with fewer candidates than deltas, that many are exchanged and no more.
    assert torch.isin(delta.indices // 6, used).sum() == 18


def test_custom_criterion() -> None:
    """A registered criterion gets the request and chooses the positions that grow."""
    requests: list[GrowthRequest] = []

    def lowest_free(request: GrowthRequest) -> Tensor:
        requests.append(request)
        free = torch.ones(request.numel, dtype=torch.bool)
        free[request.indices] = False
        return free.nonzero().flatten()

    with registered_criteria():
        register_growth_criterion("lowest_free", lowest_free, gathers=True, accumulates=True)
        model = adapt(growth="lowest_free", density=0.3)
        train(model, adamw(model), 2)
    for request, delta in zip(requests, deltas_of(model).values(), strict=True):
        assert request.shape == delta.weight_shape
        assert request.count == delta.k
        assert request.candidates.numel() == request.candidate_sums.numel() == delta.k
        assert (request.row.numel(), request.col.numel()) == delta.weight_shape
        free = sorted(set(range(delta.numel)) - set(request.indices.tolist()))
        assert set(free[: delta.k]) <= set(delta.indices.tolist())


@pytest.mark.parametrize(
    "proposal",
    [
        torch.tensor([3, 4, 3]),
        torch.tensor([-2, 2]),
        torch.tensor([2, 10_000]),
        torch.tensor([[1, 2]]),
        torch.tensor([1.0, 2.0]),
        [1, 2, 3],
        None,
    ],
    ids=["repeated", "negative", "too-large", "two-dimensional", "floating", "list", "none"],
)
def test_a_misbehaving_criterion_changes_nothing(proposal: object) -> None:
    """The function fails on the second matrix; the first one must stay unchanged too."""

    def propose(request: GrowthRequest) -> object:
        return torch.arange(request.numel) if request.shape[1] == 6 else proposal

    with registered_criteria():
        register_growth_criterion("misbehaving", propose)
        model = adapt(growth="misbehaving")
        optimizer, before = adamw(model), indices_of(model)
        train(model, optimizer, 1)
        loss_of(model, 2).backward()
        with pytest.raises(ValueError, match=r"growth criterion 'misbehaving' must propose distinct .*'2'"):
            optimizer.step()
    for name, delta in deltas_of(model).items():
        assert torch.equal(delta.indices, before[name])
        assert delta.values.detach().all()


def test_unmappable_optimizer_state_is_refused() -> None:
    model = adapt()
    optimizer = torch.optim.LBFGS(trainable(model), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 1)
        loss.backward()
        return loss

    with pytest.raises(TypeError, match="LBFGS keeps state .*growth='none'"):
        optimizer.step(closure)
    assert not any(delta.values.detach().any() for delta in deltas_of(model).values())


def test_every_matrix_and_close_draws_from_a_generator_of_its_own() -> None:
    def seeds_of_a_run() -> list[int]:
        seeds: list[int] = []

        def note(request: GrowthRequest) -> Tensor:
            seeds.append(request.generator.initial_seed())
            return request.indices

        with registered_criteria():
            register_growth_criterion("noting", note)
            model = adapt(growth="noting", total_steps=40)
            train(model, adamw(model), 10)
        return seeds

    seeds = seeds_of_a_run()
    assert len(set(seeds)) == len(seeds) == 6
    assert seeds == seeds_of_a_run()


def grow_as_ag(name: str, **settings: object) -> None:
    """Register a criterion that grows as SpIEL-AG does."""
    propose = get_growth_criterion("accumulated_gradient").propose
    register_growth_criterion(name, propose, gathers=True, **settings)  # type: ignore[arg-type]


def test_a_prune_score_of_ones_own_decides_what_is_pruned() -> None:
    """A custom prune score prunes the largest deltas; it gets the values that the close has."""
    requests: list[PruneRequest] = []

    def smallness(request: PruneRequest) -> Tensor:
        requests.append(request)
        return -request.values.abs()

    with registered_criteria():
        grow_as_ag("largest_leave", prune_score=smallness)
        model = adapt(growth="largest_leave", density=0.3, initial_regrow_rate=0.5, regrow_schedule="constant")
        optimizer = adamw(model)
        train(model, optimizer, 5)
        before = {name: (d.indices.clone(), d.values.detach().clone(), d.k) for name, d in deltas_of(model).items()}
        requests.clear()
        train(model, optimizer, 1, first=6)
    assert [request.module_name for request in requests] == list(before)
    for request, delta in zip(requests, deltas_of(model).values(), strict=True):
        indices, _, k = before[request.module_name]
        assert torch.equal(request.indices, indices) and request.count == k // 2
        assert request.gradient is not None and request.gradient.shape == (k,)
        left = ~torch.isin(indices, delta.indices)
        assert 0 < int(left.sum()) <= k // 2
        # What left was among the largest, and what was smaller than the median stayed.
        ranks = request.values.abs().argsort(descending=True, stable=True)
        assert set(left.nonzero().flatten().tolist()) <= set(ranks[: k // 2].tolist())


def test_the_absolute_value_as_a_prune_score_changes_nothing() -> None:
    def run(growth: str) -> dict[str, Tensor]:
        model = adapt(growth=growth, regrow_schedule="constant")
        train(model, adamw(model), 9)
        return {name: torch.cat([d.indices, d.values.detach()]) for name, d in deltas_of(model).items()}

    with registered_criteria():
        grow_as_ag("same", prune_score=lambda request: request.values.abs())
        own, builtin = run("same"), run("accumulated_gradient")
    assert all(torch.equal(own[name], builtin[name]) for name in own)


@pytest.mark.parametrize(
    ("scores", "problem"),
    [
        (lambda request: request.values[1:], "a torch.float32 tensor of shape"),
        (lambda request: request.indices, "a torch.int64 tensor"),
        (lambda request: request.values * torch.nan, "scores that are NaN"),
        (lambda request: None, "a NoneType"),
    ],
    ids=["too-short", "integer", "nan", "none"],
)
def test_a_misbehaving_prune_score_changes_nothing(scores: object, problem: str) -> None:
    """The function fails on the second matrix; the first one must stay unchanged too."""

    def score(request: PruneRequest) -> object:
        return request.values.abs() if request.module_name == "0" else scores(request)  # type: ignore[operator]

    with registered_criteria():
        grow_as_ag("misbehaving", prune_score=score)
        model = adapt(growth="misbehaving")
        optimizer, before = adamw(model), indices_of(model)
        train(model, optimizer, 1)
        loss_of(model, 2).backward()
        with pytest.raises(ValueError, match=rf"`prune_score` of growth criterion 'misbehaving' .*'2'.*{problem}"):
            optimizer.step()
    for name, delta in deltas_of(model).items():
        assert torch.equal(delta.indices, before[name])


def noted_counts(**fields: Any) -> dict[int, list[int]]:
    """Train 20 deltas for 19 of 20 steps; returns the numbers of candidates, by how many deltas the close replaces."""
    counts: dict[int, list[int]] = {}

    def note(request: GrowthRequest) -> Tensor:
        counts.setdefault(request.count, []).append(request.candidates.numel())
        return get_growth_criterion("accumulated_gradient").propose(request)

    with registered_criteria():
        register_growth_criterion("few", note, gathers=True, candidates_per_grown=2)
        model = adapt(growth="few", num_deltas={"0": 20}, target_modules=None, initial_regrow_rate=0.4, **fields)
        delta = first_delta(model)
        train(model, adamw(model), 19, after=lambda _: assert_sound(delta, 20))
    return counts


# Closes are at 2, 6, 10, 14 and 18 with rates 1 and 0.4 (1 - t / 20), of 20 deltas.
@pytest.mark.parametrize(
    ("candidates", "counts"),
    [
        (None, {20: [20], 5: [10], 4: [8], 2: [4]}),
        (1, {20: [20], 5: [5], 4: [4], 2: [2]}),
        (3.5, {20: [20], 5: [18], 4: [14], 2: [7]}),
        (1e9, {20: [20], 5: [20], 4: [20], 2: [20]}),
    ],
)
def test_windows_choose_as_many_candidates_as_the_close_can_grow(
    candidates: float | None, counts: dict[int, list[int]]
) -> None:
    """The config's multiple of m, else the criterion's; before the first close, which replaces all, k."""
    assert noted_counts(total_steps=20, candidates=candidates) == counts


def test_without_a_length_windows_choose_for_the_initial_rate() -> None:
    """The rate follows the learning rate then, and the first is the highest."""
    assert noted_counts(candidates=1.5) == {20: [20], 8: [12] * 4}


def test_a_close_that_grows_nothing_opens_no_window() -> None:
    model = adapt(total_steps=20, initial_regrow_rate=0.0, candidates=2)
    optimizer = adamw(model)
    train(model, optimizer, 2)

    def without_window(_: int) -> None:
        assert all(delta.state.window is None for delta in deltas_of(model).values())

    train(model, optimizer, 8, first=3, after=without_window)
