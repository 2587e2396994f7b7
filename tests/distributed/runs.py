"""Data-parallel trainings of the small model, and what must be equal on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from support.adapters import deltas_of, log_of, trainable
from support.runs import adamw, adapt, batch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spiel_peft.state import CandidateWindow

Batch = tuple[Tensor, Tensor]
FIELDS: dict[str, Any] = {"total_steps": 20, "initial_regrow_rate": 0.8}


def own_batch(rank: int, number: int, dtype: torch.dtype = torch.float32) -> Batch:
    """The batch of a rank in a step; every rank has other data."""
    return batch(100 * rank + number, dtype=dtype)


def mean_square(model: nn.Module, data: Batch) -> Tensor:
    x, y = data
    return (model(x) - y).square().mean()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """A copy of everything that must not differ between ranks."""
    out = {"replaced": torch.tensor([report.replaced for report in log_of(model)])}
    for name, delta in deltas_of(model).items():
        tensors = {"indices": delta.indices, "values": delta.values.detach(), **delta.state.tensors()}
        if delta.state.window is not None:
            window = delta.state.window
            tensors |= {"positions": window.positions, "sums": window.sums, "squares": window.squares}
        if optimizer is not None:
            kept = optimizer.state[delta.values]
            tensors |= {key: tensor for key, tensor in kept.items() if isinstance(tensor, Tensor)}
        out |= {f"{name}.{key}": tensor.clone().contiguous() for key, tensor in tensors.items()}
    return out


def assert_equal(snapshots: Iterable[dict[str, Tensor]]) -> None:
    first, *others = snapshots
    for other in others:
        assert first.keys() == other.keys()
        for key in first:
            assert torch.equal(first[key], other[key]), key


def assert_lockstep(by_rank: list[list[dict[str, Tensor]]]) -> None:
    """Check that the snapshots of all ranks are equal, step by step."""
    assert len({len(of_rank) for of_rank in by_rank}) == 1
    assert by_rank[0]
    for step in zip(*by_rank, strict=True):
        assert_equal(step)


class Training:
    """The training loop of one rank with a wrapped model.

    Args:
        rank: selects the data.
        clip: clips the norm of the gradient, if not None.
        micro_batches: number per step.
        no_sync: whether only the last micro-batch of a step is synchronized.
        base: base model; the small MLP by default.
        model: a model that is adapted already, instead of `base`.
        wrapper: settings of DistributedDataParallel.
        optimizer: makes the optimizer of the adapted model.
        fields: of the config.
    """

    def __init__(
        self,
        rank: int,
        clip: float | None = 0.1,
        micro_batches: int = 1,
        no_sync: bool = False,
        base: nn.Module | None = None,
        model: nn.Module | None = None,
        wrapper: dict[str, Any] | None = None,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
        **fields: Any,
    ) -> None:
        self.rank, self.clip, self.micro_batches, self.no_sync = rank, clip, micro_batches, no_sync
        self.model = model if model is not None else adapt(base, **{**FIELDS, **fields})
        self.dtype = next(iter(deltas_of(self.model).values())).values.dtype
        self.parallel = DistributedDataParallel(self.model, **(wrapper or {}))
        self.optimizer = optimizer(self.model)

    def backward(self, number: int) -> None:
        for micro in range(self.micro_batches):
            last = micro == self.micro_batches - 1
            with self.parallel.no_sync() if self.no_sync and not last else nullcontext():
                data = own_batch(self.rank, number + 50 * micro, self.dtype)
                (mean_square(self.parallel, data) / self.micro_batches).backward()

    def step(self, number: int) -> dict[str, Tensor]:
        self.backward(number)
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(trainable(self.model), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.snapshot()

    def snapshot(self) -> dict[str, Tensor]:
        return snapshot(self.model, self.optimizer)

    def run(self, steps: int) -> list[dict[str, Tensor]]:
        """Steps 1 to `steps`; a snapshot after each."""
        return [self.step(number) for number in range(1, steps + 1)]


def impose(model: nn.Module, positions: dict[str, Tensor]) -> None:
    """Open a window with these candidates, before a step."""
    for name, delta in deltas_of(model).items():
        chosen = positions[name].to(delta.indices.dtype)
        zeros = torch.zeros(chosen.numel(), dtype=delta.values.dtype)
        delta.state.window = CandidateWindow(chosen, zeros, zeros.clone(), shared=True)
