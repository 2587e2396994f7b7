"""Ranks with different numbers of batches, inside PyTorch's `Join`, are refused."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
from support.adapters import deltas_of
from support.ranks import launch, results_of, run_here
from torch.distributed.algorithms.join import Join

from distributed.runs import Training, assert_lockstep

RANKS = 2


def refused(rank: int, copied: bool = False, **settings: Any) -> dict[str, Any]:
    """The error inside `Join`, whether anything was changed, and the state after further steps without it."""
    training = Training(rank, **settings)
    wrapper = copy.deepcopy(training.parallel) if copied else training.parallel
    message = ""
    try:
        with Join([wrapper]):
            training.step(0)
    except RuntimeError as error:
        message = str(error)
    steps = [delta.state.step for delta in deltas_of(training.model).values()]
    for number in range(3):
        training.step(number)
    return {"message": message, "steps": steps, "snapshot": training.snapshot()}


SCENARIOS = {
    "moving": refused,
    "fixed": partial(refused, growth="none"),
    "a copy of the wrapper": partial(refused, copied=True),
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return launch(__file__, tmp_path_factory.mktemp("uneven"), RANKS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_context_for_uneven_batches_is_refused(launched: dict[str, list[Any]], name: str) -> None:
    """The error comes before a step is taken, and training without `Join` continues."""
    by_rank = results_of(launched, name)
    for result in by_rank:
        assert "a rank that has run out of batches" in result["message"] and "drop_last=True" in result["message"]
        assert not any(result["steps"])
    assert_lockstep([[result["snapshot"]] for result in by_rank])


if __name__ == "__main__":
    run_here(SCENARIOS, RANKS)
