"""Runs compared with a dense oracle: the same positions at every close, the same values and optimizer state."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.adapters import deltas_of, trainable
from support.models import mlp
from support.runs import adapt
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cycle.dense_oracle import DenseOracle, Matrix, Settings
from spiel_peft.delta import SparseDelta

Data = Callable[[int, int], tuple[Tensor, Tensor]]


class EmbeddingModel(nn.Module):
    """A model with an embedding, of which each batch uses only a few rows, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(14, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x)))


class TransposedModel(nn.Module):
    """A model of two Conv1D layers of transformers, which are transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Conv1D(9, 6)
        self.down = Conv1D(3, 9)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def vectors(step: int, micro: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(97 * step + micro)
    x = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3] - x[:, 4]], dim=1)


def ids(step: int, micro: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(97 * step + micro)
    x = torch.randint(14, (5,), generator=generator)
    return x, torch.randn(5, 3, generator=generator, dtype=torch.float64)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return make().double()


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], Data]] = {
    "mlp": (lambda: mlp(torch.float64), ["0", "2", "4"], vectors),
    "embedding": (lambda: seeded(EmbeddingModel), ["table", "head"], ids),
    "transposed": (lambda: seeded(TransposedModel), ["up", "down"], vectors),
}

DEFAULT = Settings("accumulated_gradient", 4, 3, 0.4, "linear", 24, clip=0.05, weight_decay=0.01)


class Pair:
    """A run of the project and a run of the oracle on the same data."""

    def __init__(self, kind: str, settings: Settings, dtype: torch.dtype, density: float, seed: int = 0) -> None:
        make, targets, self.data = MODELS[kind]
        self.settings, self.dtype = settings, dtype
        # Rounded to our dtype, so that both start with the very same weights.
        base = make().to(dtype)
        self.ours: PeftModel = adapt(
            copy.deepcopy(base),
            target_modules=targets,
            density=density,
            seed=seed,
            growth=settings.growth,
            regrow_every=settings.regrow_every,
            accumulation_steps=settings.accumulation_steps,
            initial_regrow_rate=settings.initial_rate,
            regrow_schedule=settings.schedule,
            total_steps=settings.total_steps,
        )
        self.deltas = deltas_of(self.ours)
        positions = {name: delta.indices.tolist() for name, delta in self.deltas.items()}
        self.oracle = DenseOracle(base.double(), positions, settings)
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        s = self.settings
        if s.optimizer == "sgd":
            return torch.optim.SGD(trainable(self.ours), lr=s.lr, momentum=s.momentum)
        return torch.optim.AdamW(trainable(self.ours), lr=s.lr, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay)

    def step(self, number: int, micro_batches: int) -> bool:
        """Take one step of both runs; returns whether a cycle closed."""
        batches = [self.data(number, micro) for micro in range(micro_batches)]
        for x, y in batches:
            x = x.to(self.dtype) if x.is_floating_point() else x
            ((self.ours(x) - y.to(self.dtype)).square().mean() / micro_batches).backward()
        if self.settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(trainable(self.ours), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # The batch is bound as a default: the oracle calls these later.
        return self.oracle.step(
            [lambda model, x=x, y=y: (model(x) - y).square().mean() / micro_batches for x, y in batches]
        )

    def state(self, delta: SparseDelta, name: str) -> Tensor:
        return self.optimizer.state[delta.values][name]


def compare(pair: Pair, tolerance: float) -> None:
    """Positions are equal, values and optimizer state agree."""
    for name, delta in pair.deltas.items():
        matrix = pair.oracle.matrices[name]
        assert delta.indices.tolist() == matrix.active, name
        expected = {"values": matrix.delta[matrix.active]}
        got: dict[str, Any] = {"values": delta.values.detach()}
        if pair.settings.optimizer == "adamw":
            expected |= {"exp_avg": matrix.first[matrix.active], "exp_avg_sq": matrix.second[matrix.active]}
        elif pair.settings.momentum:
            expected |= {"momentum_buffer": matrix.first[matrix.active]}
        got |= {key: pair.state(delta, key) for key in expected.keys() - {"values"}}
        for key, array in expected.items():
            torch.testing.assert_close(
                got[key].double(), torch.from_numpy(array), rtol=tolerance, atol=tolerance, msg=f"{name} {key}"
            )


def run_in_double(pair: Pair, micro_batches: int) -> None:
    closes = moves = 0
    for number in range(1, pair.settings.total_steps + 1):
        before = {name: matrix.active for name, matrix in pair.oracle.matrices.items()}
        closed = pair.step(number, micro_batches)
        compare(pair, 1e-9)
        closes += closed
        moves += any(before[name] != matrix.active for name, matrix in pair.oracle.matrices.items())
    assert closes >= 4
    assert moves >= 3, "the oracle moved too little to show anything"


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("growth", ["accumulated_gradient", "momentum"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_same_positions_values_and_state(kind: str, growth: str, micro_batches: int) -> None:
    run_in_double(Pair(kind, replace(DEFAULT, growth=growth), torch.float64, 0.25), micro_batches)


@pytest.mark.parametrize("growth", ["accumulated_gradient", "momentum"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("density", "seed"), [(0.1, 1), (0.5, 2)])
def test_schedules_seeds_and_densities(growth: str, schedule: str, density: float, seed: int) -> None:
    settings = replace(DEFAULT, growth=growth, schedule=schedule, initial_rate=0.7, clip=None)
    run_in_double(Pair("mlp", settings, torch.float64, density, seed), 1)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("growth", ["accumulated_gradient", "momentum"])
def test_sgd(growth: str, momentum: float) -> None:
    settings = replace(DEFAULT, growth=growth, optimizer="sgd", momentum=momentum, lr=0.1)
    run_in_double(Pair("mlp", settings, torch.float64, 0.25), 1)


@pytest.mark.parametrize(("every", "steps"), [(1, 1), (3, 3), (5, 1)])
def test_windows_of_every_length(every: int, steps: int) -> None:
    settings = replace(DEFAULT, regrow_every=every, accumulation_steps=steps)
    run_in_double(Pair("mlp", settings, torch.float64, 0.25), 1)


def near(scores: dict[int, float], threshold: float, position: int) -> bool:
    return position in scores and math.isclose(scores[position], threshold, rel_tol=1e-5, abs_tol=1e-12)


def adopt_candidates(delta: SparseDelta, matrix: Matrix) -> None:
    """Check that the candidates of both differ at most by near ties; the oracle then uses the project's candidates."""
    window = delta.state.window
    ours, theirs = set(window.positions.tolist()), set(matrix.candidates or [])
    scores = dict(enumerate(matrix.opening_scores.tolist()))
    threshold = min(scores[p] for p in theirs)
    assert all(near(scores, threshold, p) for p in ours ^ theirs)
    if ours != theirs:
        matrix.candidates = window.positions.tolist()
        matrix.sums = dict(zip(matrix.candidates, window.sums.tolist(), strict=True))
        matrix.squares = dict(zip(matrix.candidates, window.squares.tolist(), strict=True))


def follow(pair: Pair, name: str) -> None:
    """Check that the positions of both differ at most by near ties; the oracle then takes the project's state."""
    delta, matrix = pair.deltas[name], pair.oracle.matrices[name]
    closing = matrix.closing
    grow_is_log = pair.settings.growth == "momentum"
    grow = {p: math.exp(s) if grow_is_log else s for p, s in closing.grow.items()}
    threshold = math.exp(closing.grow_threshold) if grow_is_log else closing.grow_threshold
    for p in set(delta.indices.tolist()) ^ set(matrix.active):
        assert near(closing.prune, closing.prune_threshold, p) or near(grow, threshold, p), (name, p)
    matrix.mask[:] = False
    active = delta.indices.tolist()
    matrix.mask[active] = True
    for array, tensor in (
        (matrix.delta, delta.values.detach()),
        (matrix.first, pair.state(delta, "exp_avg")),
        (matrix.second, pair.state(delta, "exp_avg_sq")),
    ):
        array[:] = 0.0
        array[active] = tensor.double().numpy()


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("growth", ["accumulated_gradient", "momentum"])
def test_float32_differs_at_near_ties_only(kind: str, growth: str) -> None:
    pair = Pair(kind, replace(DEFAULT, growth=growth, eps=1e-6), torch.float32, 0.25)
    closes = 0
    for number in range(1, pair.settings.total_steps + 1):
        closed = pair.step(number, 1)
        for name, delta in pair.deltas.items():
            matrix = pair.oracle.matrices[name]
            if closed:
                follow(pair, name)
            elif delta.state.window is not None and delta.state.window.steps == 1:
                adopt_candidates(delta, matrix)
        closes += closed
    assert closes >= 5
