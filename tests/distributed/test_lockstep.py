"""Ranks with different data have the same indices, values and state after every step."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from support.models import mlp
from support.ranks import launch, results_of, run_here
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from distributed.runs import Training, assert_equal, assert_lockstep

RANKS, STEPS = 2, 11
Snapshots = list[dict[str, Tensor]]
ACCUMULATED = "accumulated_gradient"


def sm3(model: nn.Module) -> torch.optim.Optimizer:
    from spiel_peft import SM3

    return SM3([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)


def ordinary(rank: int, **settings: Any) -> Snapshots:
    return Training(rank, **settings).run(STEPS)


class Halved(nn.Module):
    """The small model; a rank may leave layer "2" out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.skips = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[1](self.net[0](x))
        return self.net[4](self.net[3](self.net[2](hidden)) if not self.skips else hidden[:, :8])


def unused_layer(rank: int) -> Snapshots:
    """In every other step, a layer gets no gradient on rank 1."""
    base = Halved()
    training = Training(
        rank, base=base, target_modules=["net.0", "net.2"], wrapper={"find_unused_parameters": True}, clip=None
    )
    out = []
    for number in range(1, STEPS + 1):
        base.skips = rank == 1 and number % 2 == 1
        out.append(training.step(number))
    return out


def empty_batches(rank: int) -> Snapshots:
    """Rank 1 has an empty batch in the steps that propose candidates, open a window and close a cycle."""
    training = Training(rank)
    out = []
    for number in range(1, STEPS + 1):
        empty = rank == 1 and number in (1, 4, 5, 6)
        x, y = torch.randn(0 if empty else 12, 6), torch.randn(0 if empty else 12, 3)
        (training.parallel(x) - y).square().sum().backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
        out.append(training.snapshot())
    return out


class Checkpointed(nn.Module):
    """The small model; the second half of its layers is checkpointed."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = mlp(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[1](self.net[0](x))
        return torch.utils.checkpoint.checkpoint(self.net[2:], hidden, use_reentrant=self.reentrant)


def checkpointed(rank: int, reentrant: bool) -> Snapshots:
    base = Checkpointed(reentrant)
    return Training(rank, base=base, target_modules=["net.0", "net.2"], wrapper={"static_graph": reentrant}).run(STEPS)


def compiled(rank: int) -> Snapshots:
    training = Training(rank)
    training.parallel = torch.compile(training.parallel, backend="eager")
    return training.run(STEPS)


def distributed_state(rank: int) -> Snapshots:
    """Each rank has the optimizer state of some matrices, and receives the values of the others."""

    def sharding(model: nn.Module) -> torch.optim.Optimizer:
        parameters = [p for p in model.parameters() if p.requires_grad]
        return ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.AdamW, lr=0.01)

    out = Training(rank, optimizer=sharding).run(STEPS)
    return [{k: v for k, v in snapshot.items() if k.split(".")[-1] not in OPTIMIZER_STATE} for snapshot in out]


OPTIMIZER_STATE = ("exp_avg", "exp_avg_sq", "step")
SCENARIOS = {
    "accumulated": partial(ordinary, growth=ACCUMULATED),
    "momentum": partial(ordinary, growth="momentum"),
    "random": partial(ordinary, growth="random"),
    "sm3": partial(ordinary, growth="momentum", optimizer=sm3),
    "long windows": partial(ordinary, regrow_every=5, accumulation_steps=4, micro_batches=2),
    "one window after the other": partial(ordinary, regrow_every=3, accumulation_steps=3),
    "every step closes": partial(ordinary, regrow_every=1, accumulation_steps=1),
    "windows of one step": partial(ordinary, regrow_every=4, accumulation_steps=1),
    "micro-batches": partial(ordinary, micro_batches=3),
    "no_sync": partial(ordinary, micro_batches=3, no_sync=True),
    "few candidates": partial(ordinary, candidates=1.5, initial_regrow_rate=0.3),
    "few candidates, length unknown": partial(ordinary, candidates=1, initial_regrow_rate=0.3, total_steps=None),
    "everything may be proposed": partial(ordinary, density=0.9),
    "regrowth ends": partial(ordinary, stop_regrowing_at=0.3),
    "unused layer": unused_layer,
    "empty batches": empty_batches,
    "reentrant checkpoints": partial(checkpointed, reentrant=True),
    "checkpoints": partial(checkpointed, reentrant=False),
    "compiled": compiled,
    "distributed state": distributed_state,
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return launch(__file__, tmp_path_factory.mktemp("lockstep"), RANKS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_are_identical_after_every_step(launched: dict[str, list[Any]], name: str) -> None:
    by_rank = results_of(launched, name)
    assert_lockstep(by_rank)
    assert (by_rank[0][-1]["replaced"][:2] > 0).all() and by_rank[0][-1]["replaced"].numel() >= 1


def test_an_optimizer_with_distributed_state_ends_where_an_ordinary_one_does(launched: dict[str, list[Any]]) -> None:
    ours, ordinary_end = (results_of(launched, name)[0][-1] for name in ("distributed state", "accumulated"))
    assert_equal([ours, {key: tensor for key, tensor in ordinary_end.items() if key in ours}])


if __name__ == "__main__":
    run_here(SCENARIOS, RANKS)
