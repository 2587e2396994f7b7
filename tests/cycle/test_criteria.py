"""Growth criteria in training: what an embedding offers, what users may register, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cycle.helpers import (
    adamw,
    adapt,
    assert_sound,
    deltas_of,
    first_delta,
    indices_of,
    loss_of,
    registered_criteria,
    train,
    trainable,
)
from spiel_peft import GrowthRequest, register_growth_criterion


class Table(nn.Module):
    """An embedding of many rows of which batches use few."""

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
    """What a user registers sees the request it asked for and decides what grows."""
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
        torch.tensor([-1, 2]),
        torch.tensor([2, 10_000]),
        torch.tensor([[1, 2]]),
        torch.tensor([1.0, 2.0]),
        [1, 2, 3],
        None,
    ],
    ids=["repeated", "negative", "too-large", "two-dimensional", "floating", "list", "none"],
)
def test_a_misbehaving_criterion_changes_nothing(proposal: object) -> None:
    """It fails on the second matrix only; the first one must be left alone too."""

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
