"""Uses of FSDP2 that deltas do not support raise an error on every rank; the error names the remedy."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from support.adapters import deltas_of
from support.models import mlp
from support.ranks import Raised, launch, results_of, run_here
from support.runs import adamw, adapt
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from distributed.runs import FIELDS, own_batch
from distributed.sharded import ShardedTraining, shard

RANKS = 2


def different_deltas(rank: int) -> None:
    model = adapt(**FIELDS)
    deltas_of(model)["2"].values.data[3] = rank
    ShardedTraining(rank, model=model).step(1)


def merged(rank: int, safe: bool) -> None:
    training = ShardedTraining(rank)
    training.step(1)
    training.model.merge_adapter(safe_merge=safe)


def not_gathered(rank: int) -> None:
    """A part of the model is called that was not passed to `fully_shard`."""
    model = fully_shard(adapt(**FIELDS))
    model.base_model.model[0](own_batch(rank, 1)[0])


def mixed_groups(rank: int) -> None:
    training = ShardedTraining(rank, modules_to_save=["4"], optimizer=partial(adamw, fused=True), clip=None)
    training.step(1)


def first_fsdp(rank: int) -> Any:
    model = adapt(**FIELDS)
    before = [name for name, _ in model.named_parameters()]
    try:
        FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    except ValueError as error:
        return str(error), before == [name for name, _ in model.named_parameters()]
    return None


def first_fsdp_without_deltas(rank: int) -> str:
    return type(FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"))).__name__


def split_in_two_ways(rank: int) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("shard", "split"))
    base = mlp()
    parallelize_module(base, mesh["split"], {"0": ColwiseParallel()})
    fully_shard(adapt(base, **FIELDS), mesh=mesh["shard"])


def sharded_by_themselves(rank: int) -> None:
    """An auto wrap policy by size may select the modules of the deltas."""
    model = adapt(**FIELDS)
    for delta in deltas_of(model).values():
        fully_shard(delta)
    shard(model)


# Scenarios with the type and the text of their error.
REFUSED: dict[str, tuple[Any, str]] = {
    "different deltas": (different_deltas, "the values of module '2' on ranks [1] differ from rank 0's"),
    "merged": (partial(merged, safe=False), "0: cannot merge into a sharded base weight, nothing was changed"),
    "merged safely": (partial(merged, safe=True), "0: cannot merge into a sharded base weight, nothing was changed"),
    "not gathered": (not_gathered, "0: its base weight is sharded. Call the module that was given to fully_shard"),
    "mixed groups": (mixed_groups, "AdamW with fused=True steps all parameters of a group at once"),
    "split in two ways": (split_in_two_ways, "SpIEL cannot adapt weights that tensor parallelism has split"),
    "deltas sharded by themselves": (sharded_by_themselves, "0: fully_shard was called on the module of its deltas"),
}
SCENARIOS: dict[str, Any] = {
    "first fsdp": first_fsdp,
    "first fsdp without deltas": first_fsdp_without_deltas,
    **{name: scenario for name, (scenario, _) in REFUSED.items()},
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return launch(__file__, tmp_path_factory.mktemp("refused"), RANKS)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_rank(launched: dict[str, list[Any]], name: str) -> None:
    for raised in launched[name]:
        assert isinstance(raised, Raised)
        assert REFUSED[name][1] in raised.message


def test_the_first_generation_of_fsdp_is_refused_before_it_flattens(launched: dict[str, list[Any]]) -> None:
    for message, unchanged in results_of(launched, "first fsdp"):
        assert "use FSDP2: fsdp_version=2" in message
        assert unchanged
    assert results_of(launched, "first fsdp without deltas") == ["FullyShardedDataParallel"] * RANKS


if __name__ == "__main__":
    run_here(SCENARIOS, RANKS)
