"""Short trainings of the small MLP with a SpIEL adapter, and comparisons of their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from spiel_kernels import check_index_set
from spiel_peft import SpIELConfig, growth
from spiel_peft.cycle.exchange import Joined, Moves
from spiel_peft.cycle.grown_seeds import GrownSeeds
from spiel_peft.cycle.optimizer_buffers import counters, reseeded_states
from spiel_peft.delta import SparseDelta
from support.adapters import deltas_of, indices_of, trainable
from support.models import mlp

Step = Callable[[int], Any]


def adapt(base: nn.Module | None = None, **fields: Any) -> PeftModel:
    """A model with a SpIEL adapter on layers "0" and "2" unless `fields` say otherwise, in training mode."""
    settings: dict[str, Any] = {"target_modules": ["0", "2"], "regrow_every": 4, "accumulation_steps": 2}
    if not {"r", "density", "num_deltas"} & fields.keys():
        settings["density"] = 0.2
    model = get_peft_model(mlp() if base is None else base, SpIELConfig(**{**settings, **fields}))
    return model.train()


def batch(number: int, size: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs and targets of step `number`, the same in every run."""
    generator = torch.Generator().manual_seed(1000 + number)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3] - x[:, 4]], dim=1)
    return x.to(dtype), y.to(dtype)


def loss_of(model: nn.Module, number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mean squared error on the batch of step `number`."""
    x, y = batch(number, dtype=dtype)
    return (model(x) - y).square().mean()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 1, after: Step | None = None
) -> None:
    """Take the training steps `first` to ``first + steps - 1``; calls `after` with the number of each step."""
    for number in range(first, first + steps):
        loss_of(model, number).backward()
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after(number)


def adamw(model: nn.Module, lr: float = 0.01, **settings: Any) -> torch.optim.AdamW:
    """AdamW on the parameters that require a gradient."""
    return torch.optim.AdamW(trainable(model), lr=lr, **settings)


def moved(before: Tensor, after: Tensor) -> int:
    """Number of positions in `after` that are not in `before`."""
    return int((~torch.isin(after, before)).sum())


def steps_with_moves(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[int]:
    """Train, and return the steps that changed indices."""
    found, before = [], indices_of(model)

    def note(number: int) -> None:
        nonlocal before
        now = indices_of(model)
        if any(moved(before[name], now[name]) for name in now):
            found.append(number)
        before = now

    train(model, optimizer, steps, after=note)
    return found


def assert_sound(delta: SparseDelta, k: int) -> None:
    """Check that a delta has k sorted, unique indices and k finite values."""
    assert delta.k == k == delta.values.numel()
    assert check_index_set(delta.indices, delta.numel) is None
    assert torch.isfinite(delta.values).all()


def assert_same_run(a: nn.Module, b: nn.Module) -> None:
    """Check that two models have the same indices and values, bit for bit."""
    left, right = deltas_of(a), deltas_of(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name].indices, right[name].indices), name
        assert torch.equal(left[name].values, right[name].values), name


@contextmanager
def registered_criteria() -> Iterator[None]:
    """Undo the registration of growth criteria inside the block."""
    growth.growth_criteria()
    before = dict(growth._CRITERIA)
    try:
        yield
    finally:
        growth._CRITERIA.clear()
        growth._CRITERIA.update(before)


def reseed(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, source: Tensor, seeds: GrownSeeds | None) -> None:
    """Move an optimizer's state for a delta's values as a close does.

    Args:
        source: int64 ``[k]``, for every new slot the old slot that it comes from, or ``-1 - i`` for grown position i.
        seeds: of the grown positions ``[m]``.
    """
    moves = moves_of(source)
    if seeds is not None:
        columns = [torch.full(source.shape, float("nan"), dtype=c.dtype) for c in (seeds.mean, seeds.mean_square)]
        for column, grown in zip(columns, (seeds.mean, seeds.mean_square), strict=True):
            column[moves.grown.cpu()] = grown.cpu()
        seeds = GrownSeeds(*(column.to(source.device) for column in columns), seeds.steps)
    counted = counters([optimizer], [parameter])
    known = {id(count): int(count) for count in counted}
    for write in reseeded_states([optimizer], [parameter], moves, seeds, known):
        write()


def moves_of(source: Tensor) -> Moves:
    """The moves with this source (see `reseed`): grown position i comes into slot i of those that are left."""
    kept = source[source >= 0]
    left = torch.ones(source.shape, dtype=torch.bool, device=source.device)
    left[kept] = False
    slots = left.nonzero().flatten()
    order = source.clone()
    order[source < 0] = slots[-1 - source[source < 0]]
    incoming = torch.where(left, 1, -1)
    return Moves(Joined([source.numel()], source.device), incoming, torch.arange(source.numel()), order)


def everything(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """A copy of indices, values, training state and optimizer state of all deltas."""
    out = {}
    for name, delta in deltas_of(model).items():
        tensors = {"indices": delta.indices, "values": delta.values.detach(), **delta.training_tensors()}
        state = optimizer.state[delta.values]
        tensors |= {f"state.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
        tensors |= {f"state.{key}": torch.tensor(v) for key, v in state.items() if isinstance(v, (int, float))}
        out |= {f"{name}.{key}": tensor.clone().contiguous() for key, tensor in tensors.items()}
    return out


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Check that both have the same names, and the same bits for each."""
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    different = [
        name
        for name, tensor in left.items()
        if tensor.dtype != right[name].dtype or not torch.equal(tensor, right[name])
    ]
    assert not different, different
