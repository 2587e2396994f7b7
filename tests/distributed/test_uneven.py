"""Ranks with different numbers of batches, inside PyTorch's `Join`: the cycle pauses while one of them has left."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cycle.helpers import deltas_of, log_of
from torch import Tensor
from torch.distributed.algorithms.join import Join

from distributed.ranks import launch, results_of, run_here
from distributed.runs import Training, assert_equal, assert_lockstep

RANKS = 3
GROWTHS = ["accumulated_gradient", "momentum", "random"]
# Batches per epoch and rank. Closes are due at steps 2, 6, 10, 14, ...: one of them while the others are away.
UNEVEN = (7, 9, 5)


def sgd(model: torch.nn.Module, momentum: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=momentum)


def progress(training: Training) -> dict[str, Any]:
    states = [delta.state for delta in deltas_of(training.model).values()]
    return {
        "snapshot": training.snapshot(),
        "steps": [state.step for state in states],
        "closes": [report.step for report in log_of(training.model)],
    }


def epochs(rank: int, batches: tuple[int, ...], divide: bool = True, **settings: Any) -> list[dict[str, Any]]:
    """Two epochs, each in a context of its own, and then three more steps together."""
    training = Training(rank, **settings)
    ends = []
    for epoch in range(2):
        with Join([training.parallel], divide_by_initial_world_size=divide):
            for number in range(batches[rank]):
                training.step(20 * epoch + number)
        ends.append(progress(training))
    for number in range(3):
        training.step(50 + number)
        ends.append(progress(training))
    return ends


def without_join(rank: int) -> list[dict[str, Any]]:
    training = Training(rank)
    for epoch in range(2):
        for number in range(6):
            training.step(20 * epoch + number)
    return [progress(training)]


def interrupted(rank: int) -> list[dict[str, Any]]:
    """A user who ends the epoch of all ranks as soon as one has no more data."""
    training = Training(rank)
    try:
        with Join([training.parallel], throw_on_early_termination=True):
            for number in range(UNEVEN[rank]):
                training.step(number)
    except RuntimeError:
        pass
    for number in range(3):
        training.step(50 + number)
    return [progress(training)]


SCENARIOS = {
    **{f"uneven, {growth}": partial(epochs, batches=UNEVEN, growth=growth) for growth in GROWTHS},
    "uneven, no clipping": partial(epochs, batches=UNEVEN, divide=False, clip=None),
    "uneven, momentum of SGD": partial(epochs, batches=UNEVEN, optimizer=partial(sgd, momentum=0.9)),
    "uneven, micro-batches": partial(epochs, batches=UNEVEN, micro_batches=2),
    "uneven, no_sync": partial(epochs, batches=UNEVEN, micro_batches=2, no_sync=True),
    "nothing at all on one rank": partial(epochs, batches=(6, 0, 6), optimizer=sgd),
    "even": partial(epochs, batches=(6, 6, 6)),
    "without join": without_join,
    "interrupted": interrupted,
}
PAUSED = [name for name in SCENARIOS if name.startswith("uneven")]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return launch(__file__, tmp_path_factory.mktemp("uneven"), RANKS)


def snapshots(by_rank: list[list[dict[str, Any]]]) -> list[list[dict[str, Tensor]]]:
    return [[{k: v for k, v in end["snapshot"].items() if k != "replaced"} for end in ends] for ends in by_rank]


@pytest.mark.parametrize("name", [*PAUSED, "even", "without join", "interrupted"])
def test_ranks_are_identical_when_they_meet_again(launched: dict[str, list[Any]], name: str) -> None:
    assert_lockstep(snapshots(results_of(launched, name)))


@pytest.mark.parametrize("name", PAUSED)
def test_nothing_closes_while_a_rank_is_away(launched: dict[str, list[Any]], name: str) -> None:
    """Rank 2 has 5 batches of the first epoch's 9 and the second's: steps 6 to 9 and 15 to 18 are without it."""
    for ends in results_of(launched, name):
        assert [end["steps"][0] for end in ends] == [9, 18, 19, 20, 21]
        assert ends[0]["closes"] == [2]
        assert ends[1]["closes"] == [2, 10, 14]


@pytest.mark.parametrize("name", PAUSED[:2])
def test_the_cycle_goes_on_afterwards(launched: dict[str, list[Any]], name: str) -> None:
    ends = results_of(launched, name)[0]
    assert ends[-1]["snapshot"]["replaced"].numel() == 3


def test_even_batches_close_as_without_a_context(launched: dict[str, list[Any]]) -> None:
    inside, outside = (results_of(launched, name)[0] for name in ("even", "without join"))
    assert inside[1]["closes"] == outside[0]["closes"] == [2, 6, 10]
    assert_equal([inside[1]["snapshot"], outside[0]["snapshot"]])


def test_a_rank_that_never_stepped_is_brought_up_to_date(launched: dict[str, list[Any]]) -> None:
    by_rank = results_of(launched, "nothing at all on one rank")
    for end in zip(*by_rank, strict=True):
        indices = [{k: v for k, v in of_rank["snapshot"].items() if "indices" in k or "values" in k} for of_rank in end]
        assert_equal(indices)
    assert [end["steps"] for end in by_rank[1]] == [end["steps"] for end in by_rank[0]]


if __name__ == "__main__":
    run_here(SCENARIOS, RANKS)
