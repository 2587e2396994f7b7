"""Only the ranks of the wrapper that a model is trained in take part in its collectives."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.adapters import deltas_of, trainable
from support.models import mlp
from support.ranks import launch, results_of, run_here
from support.runs import adamw, adapt
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distributed.runs import FIELDS, Training, assert_equal, assert_lockstep, mean_square, own_batch, snapshot
from spiel_peft import set_data_parallel_group
from spiel_peft.cycle.parallel import ranks_of

RANKS, STEPS = 3, 11
Snapshots = list[dict[str, Tensor]]


@contextmanager
def collectives() -> Iterator[list[str]]:
    """Records the names of collectives that are called in the block; calls of wrappers in C++ are not recorded."""
    names = ["all_gather", "all_reduce", "broadcast", "broadcast_object_list"]
    real = {name: getattr(dist, name) for name in names}
    called: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return real[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, noting(name))
    try:
        yield called
    finally:
        for name in names:
            setattr(dist, name, real[name])


def train_alone(model: nn.Module, rank: int, average: Callable[[], None] | None = None) -> Snapshots:
    optimizer = adamw(model)
    out = []
    for number in range(1, STEPS + 1):
        mean_square(model, own_batch(rank, number)).backward()
        if average is not None:
            average()
        optimizer.step()
        optimizer.zero_grad()
        out.append(snapshot(model, optimizer))
    return out


def only_one_rank_trains(rank: int) -> tuple[list[str], Snapshots]:
    with collectives() as called:
        return called, train_alone(adapt(**FIELDS), rank) if rank == 0 else []


def every_rank_trains_its_own(rank: int) -> tuple[list[str], Snapshots]:
    with collectives() as called:
        return called, train_alone(adapt(**FIELDS), rank)


def alone_after_together(rank: int) -> tuple[Snapshots, list[str], int]:
    """The wrapper still exists, but one rank trains the model without it."""
    training = Training(rank)
    together = training.run(3)
    with collectives() as called:
        closes = 0
        if rank == 0:
            for number in range(4, STEPS + 1):
                mean_square(training.model, own_batch(rank, number)).backward()
                training.optimizer.step()
                training.optimizer.zero_grad()
            closes = len(deltas_of(training.model)["0"].run.log)
    return together, called, closes


def a_group_of_two(rank: int) -> tuple[list[str], Snapshots]:
    """Ranks 1 and 2 train together; rank 0 trains alone meanwhile."""
    pair = dist.new_group([1, 2])
    with collectives() as called:
        if rank == 0:
            return called, train_alone(adapt(**FIELDS), rank)
        return called, Training(rank, wrapper={"process_group": pair}, clip=None).run(STEPS)


def a_wrapper_of_one(rank: int) -> tuple[list[str], Snapshots]:
    groups = [dist.new_group([index]) for index in range(RANKS)]
    with collectives() as called:
        return called, Training(rank, wrapper={"process_group": groups[rank]}, clip=None).run(STEPS)


def averaged_by_hand(rank: int) -> Snapshots:
    """Without a wrapper, the loop averages the gradients itself and declares that."""
    model = adapt(**FIELDS)
    set_data_parallel_group(model, dist.group.WORLD)

    def average() -> None:
        for parameter in trainable(model):
            parameter.grad /= RANKS
            dist.all_reduce(parameter.grad)

    return train_alone(model, rank, average)


def averaged_by_the_wrapper(rank: int) -> Snapshots:
    return Training(rank, clip=None).run(STEPS)


def told_to_be_alone(rank: int) -> list[str]:
    training = Training(rank)
    set_data_parallel_group(training.model, None)
    with collectives() as called:
        training.run(5)
    set_data_parallel_group(training.model, "auto")
    training.backward(6)
    assert ranks_of(deltas_of(training.model)["0"]) is not None
    return called


def ignored_by_the_wrapper(rank: int) -> list[str]:
    """The wrapper is told not to average the gradients of deltas."""
    model = adapt(**FIELDS)
    names = [name for name, _ in model.named_parameters() if ".spiel_delta." in name]
    model._ddp_params_and_buffers_to_ignore = names
    extra = nn.ModuleDict({"net": model, "head": nn.Linear(3, 3)})
    extra._ddp_params_and_buffers_to_ignore = [f"net.{name}" for name in names]
    extra.forward = lambda x: extra["head"](extra["net"](x))  # type: ignore[method-assign]
    parallel = DistributedDataParallel(extra)
    optimizer = adamw(extra)
    with collectives() as called:
        for number in range(1, 6):
            mean_square(parallel, own_batch(rank, number)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return called


def forward_passes_that_do_not_count(rank: int) -> list[bool]:
    """Generation and evaluation call the wrapped model on one rank only; they must start no collective."""
    training = Training(rank)
    delta = deltas_of(training.model)["0"]
    seen = [ranks_of(delta) is not None]
    with torch.no_grad():
        training.parallel(own_batch(rank, 1)[0])
    seen.append(ranks_of(delta) is not None)
    training.backward(1)
    seen.append(ranks_of(delta) is not None)
    training.optimizer.step()
    seen.append(ranks_of(delta) is not None)
    return seen


def copied_wrappers(rank: int) -> Snapshots:
    """A pickled and loaded wrapper counts as a wrapper."""
    training = Training(rank, clip=None)
    training.parallel = pickle.loads(pickle.dumps(training.parallel))
    training.model = training.parallel.module
    training.optimizer = adamw(training.model)
    return training.run(STEPS)


def two_models(rank: int) -> tuple[Snapshots, Snapshots]:
    """Two wrapped models, trained in turns by an optimizer each."""
    first, second = Training(rank), Training(rank, base=mlp(seed=1), growth="momentum")
    out: tuple[Snapshots, Snapshots] = ([], [])
    for number in range(1, STEPS + 1):
        out[0].append(first.step(number))
        if number % 2:
            out[1].append(second.step(number))
    return out


def two_adapters(rank: int) -> Snapshots:
    """One adapter is trained, the other is active and frozen; later they change roles."""
    model = adapt(**FIELDS)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "second"])
    training = Training(rank, model=model)
    out = []
    for number in range(1, STEPS + 1):
        training.step(number)
        out.append(training.snapshot() | snapshot_of(model, "second"))
    return out


def snapshot_of(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    deltas = deltas_of(model, adapter).items()
    return {f"{adapter}.{n}.indices": d.indices.clone() for n, d in deltas} | {
        f"{adapter}.{n}.values": d.values.detach().clone() for n, d in deltas
    }


SCENARIOS = {
    "only one": only_one_rank_trains,
    "each its own": every_rank_trains_its_own,
    "alone after together": alone_after_together,
    "a group of two": a_group_of_two,
    "a wrapper of one": a_wrapper_of_one,
    "by hand": averaged_by_hand,
    "by the wrapper": averaged_by_the_wrapper,
    "told to be alone": told_to_be_alone,
    "ignored": ignored_by_the_wrapper,
    "not counted": forward_passes_that_do_not_count,
    "copied": copied_wrappers,
    "two models": two_models,
    "two adapters": two_adapters,
    "three ranks, long windows": lambda rank: Training(rank, accumulation_steps=3, micro_batches=2).run(STEPS),
    "three ranks, few deltas": partial(lambda rank: Training(rank, density=0.05).run(STEPS)),
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return launch(__file__, tmp_path_factory.mktemp("membership"), RANKS)


def test_a_process_group_alone_does_nothing(launched: dict[str, list[Any]]) -> None:
    reference = train_alone(adapt(**FIELDS), 0)
    for name in ("only one", "each its own", "a wrapper of one"):
        by_rank = results_of(launched, name)
        assert all(called == [] for called, _ in by_rank)
        assert_lockstep([by_rank[0][1], reference])
    own = [snapshots[-1]["0.indices"] for _, snapshots in results_of(launched, "each its own")]
    assert not torch.equal(own[0], own[1])


def test_one_rank_goes_on_alone(launched: dict[str, list[Any]]) -> None:
    by_rank = results_of(launched, "alone after together")
    assert_lockstep([together for together, _, _ in by_rank])
    assert all(called == [] for _, called, _ in by_rank)
    assert by_rank[0][2] == 3


def test_only_the_ranks_of_the_wrappers_group_take_part(launched: dict[str, list[Any]]) -> None:
    alone, *pair = results_of(launched, "a group of two")
    assert alone[0] == []
    assert pair[0][0] == pair[1][0] != []
    assert_lockstep([snapshots for _, snapshots in pair])
    assert_lockstep([alone[1], train_alone(adapt(**FIELDS), 0)])


def test_gradients_averaged_by_hand(launched: dict[str, list[Any]]) -> None:
    by_hand = results_of(launched, "by hand")
    assert_lockstep(by_hand)
    by_wrapper = results_of(launched, "by the wrapper")
    for key, tensor in by_hand[0][-1].items():
        torch.testing.assert_close(tensor, by_wrapper[0][-1][key], msg=key)


def test_a_user_may_say_that_a_process_trains_alone(launched: dict[str, list[Any]]) -> None:
    assert results_of(launched, "told to be alone") == [[]] * RANKS
    assert results_of(launched, "ignored") == [[]] * RANKS


def test_forward_passes_without_gradient_do_not_count(launched: dict[str, list[Any]]) -> None:
    assert results_of(launched, "not counted") == [[False, False, True, False]] * RANKS


def test_a_copy_of_a_wrapper_is_one(launched: dict[str, list[Any]]) -> None:
    by_rank = results_of(launched, "copied")
    assert_lockstep(by_rank)
    assert_equal([by_rank[0][-1], results_of(launched, "by the wrapper")[0][-1]])


@pytest.mark.parametrize("name", ["three ranks, long windows", "three ranks, few deltas", "two adapters"])
def test_three_ranks_are_identical(launched: dict[str, list[Any]], name: str) -> None:
    by_rank = results_of(launched, name)
    assert_lockstep(by_rank)
    assert by_rank[0][-1]["replaced"][0] > 0


def test_two_models_keep_apart(launched: dict[str, list[Any]]) -> None:
    by_rank = results_of(launched, "two models")
    assert_lockstep([first for first, _ in by_rank])
    assert_lockstep([second for _, second in by_rank])


def test_bad_groups() -> None:
    with pytest.raises(ValueError, match="no SpIEL deltas: add the adapter"):
        set_data_parallel_group(mlp(), None)
    for wrong in ("world", 3):
        with pytest.raises(ValueError, match="group must be a torch.distributed process group, None or 'auto'"):
            set_data_parallel_group(adapt(), wrong)


if __name__ == "__main__":
    run_here(SCENARIOS, RANKS)
