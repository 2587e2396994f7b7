"""Trainings of the small model whose base weights are sharded over the ranks by FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.adapters import deltas_of, trainable
from support.runs import adamw, adapt
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distributed.runs import FIELDS, mean_square, own_batch, snapshot

Snapshots = list[dict[str, Tensor]]


def shard(model: nn.Module, **settings: Any) -> nn.Module:
    """`fully_shard` on every layer of the small model, and on the model."""
    for layer in list(model.base_model.model.children()):
        if any(True for _ in layer.parameters()):
            fully_shard(layer, **settings)
    fully_shard(model, **settings)
    return model


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Gather the whole base weights on every rank (a collective)."""
    named = [(name, p.detach()) for name, p in model.named_parameters() if not p.requires_grad]
    whole = {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in named}
    # As bytes: packed 4-bit weights may look like NaN.
    return {name: weight.contiguous().view(-1).view(torch.uint8) for name, weight in whole.items()}


class ShardedTraining:
    """The training loop of one rank with a sharded model; its steps are those of `distributed.runs.Training`."""

    def __init__(
        self,
        rank: int,
        clip: float | None = 0.1,
        micro_batches: int = 1,
        no_sync: bool = False,
        base: nn.Module | None = None,
        model: nn.Module | None = None,
        shards: Callable[[nn.Module], nn.Module] = shard,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
        **fields: Any,
    ) -> None:
        self.rank, self.clip, self.micro_batches, self.no_sync = rank, clip, micro_batches, no_sync
        self.model = shards(model if model is not None else adapt(base, **{**FIELDS, **fields}))
        self.weights = base_weights(self.model)
        self.optimizer = optimizer(self.model)

    def backward(self, number: int) -> None:
        for micro in range(self.micro_batches):
            if self.no_sync:
                self.model.set_requires_gradient_sync(micro == self.micro_batches - 1)
            loss = mean_square(self.model, own_batch(self.rank, number + 50 * micro)) / self.micro_batches
            loss.backward()

    def step(self, number: int) -> dict[str, Tensor]:
        self.backward(number)
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(trainable(self.model), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return snapshot(self.model, self.optimizer)

    def run(self, steps: int) -> Snapshots:
        """Steps 1 to `steps`; a snapshot after each. The base weights end as they began."""
        out = [self.step(number) for number in range(1, steps + 1)]
        for name, weight in base_weights(self.model).items():
            assert torch.equal(weight, self.weights[name]), f"{name} has changed"
        assert all(type(delta.values) is nn.Parameter for delta in deltas_of(self.model).values())
        return out


def in_bfloat16() -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
