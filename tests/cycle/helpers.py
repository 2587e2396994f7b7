"""Small adapted models, loops that train them, and checks that every close must pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from spiel_kernels import check_index_set
from spiel_peft import CycleReport, SpIELConfig, SpIELLayer, growth
from spiel_peft.cycle.grown_seeds import GrownSeeds
from spiel_peft.cycle.optimizer_buffers import reseeded_states
from spiel_peft.delta import SparseDelta

Step = Callable[[int], Any]


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Three linear layers ("0", "2", "4") with smooth activations."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.GELU(approximate="tanh"), nn.Linear(8, 3)
    ).to(dtype)


def adapt(base: nn.Module | None = None, **fields: Any) -> PeftModel:
    """A model with a SpIEL adapter on layers "0" and "2" unless `fields` say otherwise, in training mode."""
    settings: dict[str, Any] = {"target_modules": ["0", "2"], "regrow_every": 4, "accumulation_steps": 2}
    if not {"r", "density", "num_deltas"} & fields.keys():
        settings["density"] = 0.2
    model = get_peft_model(mlp() if base is None else base, SpIELConfig(**{**settings, **fields}))
    return model.train()


def deltas_of(model: nn.Module, adapter: str = "default") -> dict[str, SparseDelta]:
    """The deltas of an adapter by module name."""
    return {
        layer.module_name: layer.spiel_delta[adapter]
        for layer in model.modules()
        if isinstance(layer, SpIELLayer) and adapter in layer.spiel_delta
    }


def first_delta(model: nn.Module, adapter: str = "default") -> SparseDelta:
    return next(iter(deltas_of(model, adapter).values()))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def log_of(model: nn.Module, adapter: str = "default") -> list[CycleReport]:
    return first_delta(model, adapter).run.log


def indices_of(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    return {name: delta.indices.clone() for name, delta in deltas_of(model, adapter).items()}


def batch(number: int, size: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs and targets of step `number`, the same in every run."""
    generator = torch.Generator().manual_seed(1000 + number)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3] - x[:, 4]], dim=1)
    return x.to(dtype), y.to(dtype)


def loss_of(model: nn.Module, number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x, y = batch(number, dtype=dtype)
    return (model(x) - y).square().mean()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 1, after: Step | None = None
) -> None:
    """Plain training steps number `first` to ``first + steps - 1``; `after` is called with each step's number."""
    for number in range(first, first + steps):
        loss_of(model, number).backward()
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after(number)


def adamw(model: nn.Module, lr: float = 0.01, **settings: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model), lr=lr, **settings)


def moved(before: Tensor, after: Tensor) -> int:
    """Positions of `after` that are not in `before`."""
    return int((~torch.isin(after, before)).sum())


def steps_with_moves(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[int]:
    """Train and note the steps after which some index differs."""
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
    """The invariant of an index set, and finite values for it."""
    assert delta.k == k == delta.values.numel()
    assert check_index_set(delta.indices, delta.numel) is None
    assert torch.isfinite(delta.values).all()


def assert_same_run(a: nn.Module, b: nn.Module) -> None:
    """Bit-identical indices and values."""
    left, right = deltas_of(a), deltas_of(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name].indices, right[name].indices), name
        assert torch.equal(left[name].values, right[name].values), name


@contextmanager
def registered_criteria() -> Iterator[None]:
    """Take back the growth criteria that are registered inside."""
    growth.growth_criteria()
    before = dict(growth._CRITERIA)
    try:
        yield
    finally:
        growth._CRITERIA.clear()
        growth._CRITERIA.update(before)


def reseed(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, source: Tensor, seeds: GrownSeeds | None) -> None:
    """Move an optimizer's state for a delta's values as a close does."""
    for write in reseeded_states([optimizer], parameter, source, seeds):
        write()
