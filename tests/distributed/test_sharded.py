"""A run whose base weights are sharded by FSDP2 equals the run with DDP, bit for bit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.adapters import deltas_of, trainable
from support.models import mlp
from support.ranks import launch, results_of, run_here
from support.runs import adapt
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distributed.runs import FIELDS, Training, assert_lockstep, mean_square, own_batch, snapshot
from distributed.sharded import ShardedTraining, Snapshots, in_bfloat16, shard
from spiel_peft import SM3, set_data_parallel_group

RANKS, STEPS = 2, 11


def momentum_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable(model), lr=0.05, momentum=0.9)


def sm3(model: nn.Module) -> torch.optim.Optimizer:
    return SM3(trainable(model), lr=0.01, momentum=0.9)


# Settings of a run, by name: each is run by DDP and by FSDP2.
RUNS: dict[str, dict[str, Any]] = {
    "accumulated": {},
    "momentum": {"growth": "momentum"},
    "random": {"growth": "random"},
    "micro-batches": {"micro_batches": 2},
    "no clipping, long windows": {"clip": None, "regrow_every": 5, "accumulation_steps": 4},
    "momentum of SGD": {"optimizer": momentum_sgd},
    "sm3": {"optimizer": sm3, "growth": "momentum"},
}


def by_ddp(rank: int, **settings: Any) -> Snapshots:
    return Training(rank, **settings).run(STEPS)


def by_fsdp2(rank: int, **settings: Any) -> Snapshots:
    return ShardedTraining(rank, **settings).run(STEPS)


def either(rank: int, ddp: bool, **settings: Any) -> Snapshots:
    return (by_ddp if ddp else by_fsdp2)(rank, **settings)


class Bfloat16(nn.Module):
    """The small model computed in bfloat16, as FSDP2's mixed precision does it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp().to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(torch.bfloat16)).float()


class Parts(nn.Module):
    """The small model with a block that is checkpointed, and that a rank may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.skips = mlp(), False

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.utils.checkpoint.checkpoint(self.net[:2], x, use_reentrant=False)
        return self.net[4](self.net[3](hidden[:, :8] if self.skips else self.net[2](hidden)))


def shard_parts(model: nn.Module) -> nn.Module:
    fully_shard(model.base_model.model.net[0])
    return fully_shard(model)


def shard_in_bfloat16(model: nn.Module, **settings: Any) -> nn.Module:
    return fully_shard(model, mp_policy=in_bfloat16(), **settings)


def left_out(rank: int, ddp: bool, ranks: tuple[int, ...]) -> list[dict[str, Any]]:
    """In every other step, the given ranks skip a layer."""
    base = Parts()
    settings: dict[str, Any] = {"base": base, "target_modules": ["net.0", "net.2"], "clip": None}
    if ddp:
        training: Any = Training(rank, wrapper={"find_unused_parameters": True}, **settings)
    else:
        training = ShardedTraining(rank, shards=fully_shard, **settings)
    out = []
    for number in range(1, STEPS + 1):
        base.skips = rank in ranks and number % 2 == 1
        training.backward(number)
        grad = deltas_of(training.model)["net.2"].values.grad
        training.optimizer.step()
        training.optimizer.zero_grad()
        out.append({**snapshot(training.model, training.optimizer), "reached": torch.tensor(grad is not None)})
    return out


def overflow(rank: int, ddp: bool) -> Snapshots:
    """Rank 1's loss is not finite in a step that opens a window."""
    training: Any = (Training if ddp else ShardedTraining)(rank, clip=None)
    out = []
    for number in range(1, STEPS + 1):
        training.backward(number)
        if rank == 1 and number == 5:
            parallel = training.parallel if ddp else training.model
            (mean_square(parallel, own_batch(rank, number)) * float("inf")).backward()
        elif number == 5:
            mean_square(training.parallel if ddp else training.model, own_batch(rank, number)).backward()
        grads = [p.grad for p in trainable(training.model)]
        if all(torch.isfinite(g).all() for g in grads if g is not None):
            training.optimizer.step()
        training.optimizer.zero_grad()
        out.append(snapshot(training.model, training.optimizer))
    return out


def shard_over(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    return shard(model, mesh=mesh)


def adapter_on_a_sharded_model(rank: int) -> Snapshots:
    """The base model is sharded first, as transformers does that when it loads one."""
    base = mlp()
    for layer in (base[0], base[2], base[4]):
        fully_shard(layer)
    return ShardedTraining(rank, model=adapt(fully_shard(base), **FIELDS), shards=lambda model: model).run(STEPS)


def with_a_dense_layer(rank: int, ddp: bool, **settings: Any) -> Snapshots:
    """Layer "4" is trained as a whole: FSDP2 shards it, its optimizer steps sharded and whole parameters."""
    return either(rank, ddp, **{"modules_to_save": ["4"], "clip": None, **settings})


def shares(rank: int) -> dict[str, Any]:
    """The shares of the base weights that this rank has, whether it has all deltas, and the dtype of indices."""
    model = shard(adapt(**FIELDS))
    parameters = dict(model.named_parameters())
    return {
        "base": [p.to_local().numel() / p.numel() for n, p in parameters.items() if n.endswith("base_layer.weight")],
        "deltas": [d.values.numel() == d.k == d.indices.numel() for d in deltas_of(model).values()],
        "indices": {d.indices.dtype for d in deltas_of(model).values()},
    }


def alone(rank: int) -> bool:
    """Gradients that are averaged in another way must be declared."""
    training = ShardedTraining(rank)
    set_data_parallel_group(training.model, None)
    training.backward(1)
    gradient = deltas_of(training.model)["0"].values.grad
    both = [torch.empty_like(gradient) for _ in range(RANKS)]
    dist.all_gather(both, gradient)
    return torch.equal(both[0], both[1])


SAME_AS_DDP = {
    "kept whole after the forward pass": partial(shard, reshard_after_forward=False),
    "one group": fully_shard,
    "mesh of one dimension": partial(shard_over, shape=(2,)),
    "hybrid, copies": partial(shard_over, shape=(2, 1)),
    "hybrid, shards": partial(shard_over, shape=(1, 2)),
}
IN_NET = {"target_modules": ["net.0", "net.2"]}
PAIRS = {
    "one leaves out a layer": partial(left_out, ranks=(1,)),
    "all leave out a layer": partial(left_out, ranks=(0, 1)),
    "overflow": overflow,
    "dense layer": with_a_dense_layer,
    **{name: partial(either, **settings) for name, settings in RUNS.items()},
}
SCENARIOS: dict[str, Any] = {
    **{f"ddp, {name}": partial(run, ddp=True) for name, run in PAIRS.items()},
    **{f"fsdp2, {name}": partial(run, ddp=False) for name, run in PAIRS.items()},
    **{name: partial(by_fsdp2, shards=shards) for name, shards in SAME_AS_DDP.items()},
    "no_sync": partial(by_fsdp2, micro_batches=2, no_sync=True),
    "adapter on a sharded model": adapter_on_a_sharded_model,
    "ddp, checkpointed": lambda rank: by_ddp(rank, base=Parts(), **IN_NET),
    "checkpointed": lambda rank: by_fsdp2(rank, base=Parts(), shards=shard_parts, **IN_NET),
    "ddp, bfloat16": lambda rank: by_ddp(rank, base=Bfloat16(), **IN_NET),
    "bfloat16": lambda rank: by_fsdp2(rank, base=Parts(), shards=shard_in_bfloat16, **IN_NET),
    "bfloat16, kept": lambda rank: by_fsdp2(
        rank, base=Parts(), shards=partial(shard_in_bfloat16, reshard_after_forward=False), **IN_NET
    ),
    "shares": shares,
    "alone": alone,
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return launch(__file__, tmp_path_factory.mktemp("sharded"), RANKS)


@pytest.mark.parametrize("name", PAIRS)
def test_a_sharded_run_is_a_data_parallel_run(launched: dict[str, list[Any]], name: str) -> None:
    by_rank = results_of(launched, f"fsdp2, {name}")
    assert_lockstep([*by_rank, results_of(launched, f"ddp, {name}")[0]])
    assert (by_rank[0][-1]["replaced"][:2] > 0).all()


@pytest.mark.parametrize("name", [*SAME_AS_DDP, "adapter on a sharded model"])
def test_however_it_is_sharded(launched: dict[str, list[Any]], name: str) -> None:
    assert_lockstep([*results_of(launched, name), results_of(launched, "ddp, accumulated")[0]])


def test_checkpointed_blocks(launched: dict[str, list[Any]]) -> None:
    assert_lockstep([*results_of(launched, "checkpointed"), results_of(launched, "ddp, checkpointed")[0]])


def test_without_synchronization_micro_batches_are_averaged_as_well(launched: dict[str, list[Any]]) -> None:
    """Averaging an average changes nothing, so it does not matter whether FSDP2 synchronizes every micro-batch."""
    assert_lockstep([*results_of(launched, "no_sync"), results_of(launched, "ddp, micro-batches")[0]])


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16, kept"])
def test_in_mixed_precision_deltas_are_added_in_float32(launched: dict[str, list[Any]], name: str) -> None:
    assert_lockstep([*results_of(launched, name), results_of(launched, "ddp, bfloat16")[0]])


def test_a_layer_that_no_rank_reaches_has_no_gradient(launched: dict[str, list[Any]]) -> None:
    one, everyone = (results_of(launched, f"fsdp2, {who} a layer")[0] for who in ("one leaves out", "all leave out"))
    assert all(end["reached"] for end in one)
    assert [bool(end["reached"]) for end in everyone] == [number % 2 == 0 for number in range(1, STEPS + 1)]


def test_what_a_rank_holds(launched: dict[str, list[Any]]) -> None:
    for held in results_of(launched, "shares"):
        assert held == {"base": [0.5, 0.5], "deltas": [True, True], "indices": {torch.int32}}


def test_a_user_may_average_gradients_himself(launched: dict[str, list[Any]]) -> None:
    assert results_of(launched, "alone") == [False] * RANKS


if __name__ == "__main__":
    run_here(SCENARIOS, RANKS)
