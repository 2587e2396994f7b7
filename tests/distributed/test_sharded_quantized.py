"""4-bit base weights, stored as floating numbers so that FSDP2 can shard them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from support.adapters import deltas_of
from support.ranks import launch, results_of, run_here
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distributed.runs import Training, assert_lockstep
from distributed.sharded import ShardedTraining, Snapshots

RANKS, STEPS, WIDTH = 2, 7, 64
STORAGES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}


class Quantized(nn.Module):
    """An NF4 layer between two ordinary ones."""

    def __init__(self, storage: torch.dtype, nested: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, plain, self.after = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.packed = Linear4bit(WIDTH, WIDTH, quant_type="nf4", quant_storage=storage, compress_statistics=nested)
        self.packed.weight = Params4bit(
            plain.weight.data,
            requires_grad=False,
            quant_type="nf4",
            quant_storage=storage,
            compress_statistics=nested,
            module=self.packed,
        )
        self.packed.bias = nn.Parameter(plain.bias.data.clone())
        self.packed.to("cpu")  # quantizes

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.packed(self.before(x).tanh()).tanh())


def shard(model: nn.Module, is_sharded: bool) -> nn.Module:
    """Shard as Accelerate does, which leaves integer tensors whole."""
    packed = model.base_model.model.packed
    ignored = set() if is_sharded else {packed.get_base_layer().weight}
    fully_shard(packed, ignored_params=ignored)
    fully_shard(model, ignored_params=ignored)
    assert isinstance(packed.get_base_layer().weight, DTensor) == is_sharded
    return model


def by_ddp(rank: int, storage: torch.dtype, nested: bool) -> Snapshots:
    return Training(rank, base=Quantized(storage, nested), target_modules=["packed"]).run(STEPS)


def by_fsdp2(rank: int, storage: torch.dtype, nested: bool) -> Snapshots:
    shards = partial(shard, is_sharded=storage != torch.uint8)
    training = ShardedTraining(rank, base=Quantized(storage, nested), target_modules=["packed"], shards=shards)
    assert deltas_of(training.model)["packed"].k == round(0.2 * WIDTH * WIDTH)
    return training.run(STEPS)


CASES = [(name, nested) for name in STORAGES for nested in (False, True)]
SCENARIOS: dict[str, Any] = {
    f"{kind} {name} {nested}": partial(run, storage=STORAGES[name], nested=nested)
    for name, nested in CASES
    for kind, run in (("ddp", by_ddp), ("fsdp2", by_fsdp2))
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return launch(__file__, tmp_path_factory.mktemp("quantized"), RANKS)


@pytest.mark.parametrize("name, nested", CASES)
def test_a_run_on_sharded_bytes_is_a_data_parallel_run(launched: dict[str, list[Any]], name: str, nested: bool) -> None:
    by_rank = results_of(launched, f"fsdp2 {name} {nested}")
    assert_lockstep([*by_rank, results_of(launched, f"ddp {name} {nested}")[0]])
    assert (by_rank[0][-1]["replaced"] > 0).all()


if __name__ == "__main__":
    run_here(SCENARIOS, RANKS)
