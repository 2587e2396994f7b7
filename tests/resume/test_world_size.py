"""A run is resumed by another number of processes than saved it: all continue from the same state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch.distributed as dist
from support.ranks import launch, results_of, run_here
from support.runs import assert_same, everything
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from resume.helpers import GROWTHS, Run

RANKS = 2
# In the window of steps 6-8: the candidates are those of the checkpoint, however many processes sum their gradients.
STOP, CLOSE, END = 7, 8, 14


class Parallel(Run):
    """A run of all ranks together; `plain` is the model that DDP wraps."""

    def use(self, model: Any) -> None:
        super().use(model)
        self.plain, self.model = self.model, DistributedDataParallel(self.model)

    def everything(self) -> dict[str, Tensor]:
        return everything(self.plain, self.optimizer)


def saved(run: Run) -> list[dict[str, Any]]:
    """The state that rank 0 would write to a file."""
    return copy.deepcopy([getattr(run, "plain", run.model).state_dict(), run.optimizer.state_dict()])


def resumed(kind: type[Run], state_dicts: list[dict[str, Any]], growth: str) -> Any:
    run = kind(growth=growth)
    getattr(run, "plain", run.model).load_state_dict(state_dicts[0])
    run.optimizer.load_state_dict(copy.deepcopy(state_dicts[1]))  # it would use the very same tensors
    return run


def from_one_to_two(rank: int) -> dict[str, list[dict[str, Tensor]]]:
    """All ranks on the same batches until the close, where one process must be at as well; then each on its own."""
    out = {}
    for growth in GROWTHS:
        run = resumed(Parallel, saved(Run(growth=growth).train(1, STOP)), growth).train(STOP + 1, CLOSE)
        at_close = run.everything()
        first = 100 * rank + CLOSE + 1
        out[growth] = [at_close, run.train(first, first + END - CLOSE - 1).everything()]
    return out


def from_two(rank: int) -> dict[str, list[dict[str, Tensor] | None]]:
    """The end of an uninterrupted run and of one that is resumed by two; its close, and that of one resumed by one."""
    out = {}
    for growth in GROWTHS:
        run = Parallel(growth=growth).train(1, STOP)
        objects = [saved(run)]
        dist.broadcast_object_list(objects)
        again = resumed(Parallel, objects[0], growth).train(STOP + 1, END)
        at_close = run.train(STOP + 1, CLOSE).everything()
        run.train(CLOSE + 1, END)
        alone = resumed(Run, objects[0], growth).train(STOP + 1, CLOSE)
        out[growth] = [run.everything(), again.everything(), at_close, alone.everything()]
    return out


def around_an_opening(rank: int) -> list[dict[str, Tensor]]:
    """The end of an uninterrupted run, and of runs resumed where its ranks have proposed and chosen candidates."""
    run, checkpoints = Parallel(), []
    for step in range(1, END + 1):
        run.train(step, step)
        if step in (2, 5, 6, 10):
            objects = [saved(run)]
            dist.broadcast_object_list(objects)
            checkpoints.append((step, objects[0]))
    ends = [resumed(Parallel, state, GROWTHS[0]).train(step + 1, END).everything() for step, state in checkpoints]
    return [run.everything(), *ends]


SCENARIOS = {"from_one_to_two": from_one_to_two, "from_two": from_two, "around_an_opening": around_an_opening}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return launch(__file__, tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.parametrize("growth", GROWTHS)
def test_two_processes_resume_the_run_of_one(launched: dict[str, list[Any]], growth: str) -> None:
    first, second = (result[growth] for result in results_of(launched, "from_one_to_two"))
    alone = Run(growth=growth).train(1, CLOSE).everything()
    for at_close, end in (first, second):
        assert_same(at_close, alone)
        assert_same(end, first[1])


@pytest.mark.parametrize("growth", GROWTHS)
def test_one_process_resumes_the_run_of_two(launched: dict[str, list[Any]], growth: str) -> None:
    """Two processes resume the run bit for bit."""
    results = [result[growth] for result in results_of(launched, "from_two")]
    for whole, again, at_close, alone in results:
        assert_same(whole, results[0][0])
        assert_same(again, whole)
        assert_same(alone, at_close)


def test_windows_that_several_processes_open_are_resumed(launched: dict[str, list[Any]]) -> None:
    for whole, *others in results_of(launched, "around_an_opening"):
        assert len(others) == 4
        for end in others:
            assert_same(end, whole)


if __name__ == "__main__":
    run_here(SCENARIOS, RANKS)
