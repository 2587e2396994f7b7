"""An oracle: the algorithm on dense matrices and with plain loops.

An ordinary model computes with ``W0 + delta``, autograd forms the whole dW, and Python lists are sorted. Nothing of
spiel_peft is used, so that an error there cannot be repeated here. float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Loss = Callable[[nn.Module], Tensor]
Array = NDArray[np.float64]


@dataclass
class Settings:
    """Settings of a run; the names are those of the config and the optimizers."""

    growth: str
    regrow_every: int
    accumulation_steps: int
    initial_rate: float
    schedule: str
    total_steps: int
    lr: float = 0.02
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    clip: float | None = None


@dataclass
class Closing:
    """The oracle's scores and thresholds at one close, which show the decisions that were near ties."""

    prune: dict[int, float]
    prune_threshold: float
    grow: dict[int, float]
    grow_threshold: float


@dataclass
class Matrix:
    """One adapted weight. Arrays are flat, as long as the weight, and zero at inactive positions."""

    base: Tensor
    mask: NDArray[np.bool_]
    delta: Array = field(init=False)
    first: Array = field(init=False)
    second: Array = field(init=False)
    row: Array = field(init=False)
    col: Array = field(init=False)
    candidates: list[int] | None = None
    sums: dict[int, float] = field(default_factory=dict)
    squares: dict[int, float] = field(default_factory=dict)
    window_steps: int = 0
    opening_scores: Array | None = None
    closing: Closing | None = None

    def __post_init__(self) -> None:
        size, rows = self.base.numel(), self.base.shape[0]
        self.delta, self.first, self.second = np.zeros(size), np.zeros(size), np.zeros(size)
        self.row, self.col = np.zeros(rows), np.zeros(size // rows)

    @property
    def active(self) -> list[int]:
        return [int(p) for p in np.flatnonzero(self.mask)]


class DenseOracle:
    """Trains `model` by SpIEL on the weights named in `positions`.

    Args:
        model: an ordinary float64 model; its weights are overwritten.
        positions: module name to the initial active positions.
    """

    def __init__(self, model: nn.Module, positions: dict[str, list[int]], settings: Settings) -> None:
        self.model, self.settings, self.steps = model, settings, 0
        self.matrices: dict[str, Matrix] = {}
        for name, active in positions.items():
            weight = model.get_submodule(name).weight
            mask = np.zeros(weight.numel(), dtype=bool)
            mask[active] = True
            self.matrices[name] = Matrix(weight.detach().clone(), mask)

    def step(self, losses: list[Loss]) -> bool:
        """One optimizer step over these micro-batches; returns whether a cycle closed."""
        done = {name: np.zeros(m.delta.size) for name, m in self.matrices.items()}
        gathered = {name: np.zeros(m.delta.size) for name, m in self.matrices.items()}
        for loss in losses:
            for name, gradient in self._dense_gradients(loss).items():
                matrix = self.matrices[name]
                self._open_window(matrix, gradient)
                done[name] += gradient * matrix.mask
                gathered[name] += gradient
        factor = self._clip_factor(done)
        self.steps += 1
        for name, matrix in self.matrices.items():
            if matrix.candidates is not None:
                for p in matrix.candidates:
                    matrix.sums[p] += gathered[name][p] * factor
                    matrix.squares[p] += (gathered[name][p] * factor) ** 2
                matrix.window_steps += 1
            self._update(matrix, done[name] * factor)
            if self.settings.growth == "momentum":
                _accumulate(matrix, done[name] * factor)
        g, every = self.settings.accumulation_steps, self.settings.regrow_every
        closes = self.steps >= g and (self.steps - g) % every == 0
        if closes:
            for matrix in self.matrices.values():
                self._close(matrix)
        return closes

    def _dense_gradients(self, loss: Loss) -> dict[str, Array]:
        weights = {name: self.model.get_submodule(name).weight for name in self.matrices}
        for name, weight in weights.items():
            matrix = self.matrices[name]
            weight.data = matrix.base + torch.from_numpy(matrix.delta).view(matrix.base.shape)
            weight.requires_grad_(True)
            weight.grad = None
        loss(self.model).backward()
        return {name: weight.grad.flatten().numpy().copy() for name, weight in weights.items()}

    def _open_window(self, matrix: Matrix, gradient: Array) -> None:
        s = self.settings
        cycle = max(0, math.ceil((self.steps + 1 - s.accumulation_steps) / s.regrow_every))
        close = s.accumulation_steps + cycle * s.regrow_every
        if s.growth != "accumulated_gradient" or matrix.candidates is not None:
            return
        if close - self.steps > s.accumulation_steps:
            return
        scores = np.abs(gradient)
        ranked = sorted((p for p in range(scores.size) if scores[p] > 0), key=lambda p: (-scores[p], p))
        self.set_candidates(matrix, ranked[: int(matrix.mask.sum())])
        matrix.opening_scores = scores

    def set_candidates(self, matrix: Matrix, positions: list[int]) -> None:
        matrix.candidates = positions
        matrix.sums = dict.fromkeys(positions, 0.0)
        matrix.squares = dict.fromkeys(positions, 0.0)
        matrix.window_steps = 0

    def _clip_factor(self, gradients: dict[str, Array]) -> float:
        if self.settings.clip is None:
            return 1.0
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
        return min(1.0, self.settings.clip / (norm + 1e-6))

    def _update(self, matrix: Matrix, gradient: Array) -> None:
        s = self.settings
        for p in matrix.active:
            g = gradient[p]
            if s.optimizer == "sgd":
                matrix.first[p] = s.momentum * matrix.first[p] + g
                matrix.delta[p] -= s.lr * matrix.first[p]
                continue
            matrix.delta[p] *= 1 - s.lr * s.weight_decay
            matrix.first[p] = s.betas[0] * matrix.first[p] + (1 - s.betas[0]) * g
            matrix.second[p] = s.betas[1] * matrix.second[p] + (1 - s.betas[1]) * g * g
            mean = matrix.first[p] / (1 - s.betas[0] ** self.steps)
            root = math.sqrt(matrix.second[p] / (1 - s.betas[1] ** self.steps))
            matrix.delta[p] -= s.lr * mean / (root + s.eps)

    def _rate(self) -> float:
        s = self.settings
        if self.steps == s.accumulation_steps:
            return 1.0  # the first close of a fresh adapter replaces all random positions
        if s.schedule == "linear":
            return s.initial_rate * (1 - self.steps / s.total_steps)
        if s.schedule == "cosine":
            return s.initial_rate * (1 + math.cos(math.pi * self.steps / s.total_steps)) / 2
        return s.initial_rate

    def _ranked(self, matrix: Matrix) -> dict[int, float]:
        """Score of every position that may be grown, best first."""
        if self.settings.growth == "accumulated_gradient":
            scores = {p: abs(total) for p, total in matrix.sums.items() if total != 0}
        else:
            cols = matrix.col.size
            scores = {}
            for p in np.flatnonzero(~matrix.mask):
                a, b = matrix.row[p // cols], matrix.col[p % cols]
                if a > 0 and b > 0:
                    scores[int(p)] = math.log(a) + math.log(b)
        return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0])))

    def _close(self, matrix: Matrix) -> None:
        active = matrix.active
        ranked = self._ranked(matrix)
        smallest_first = sorted(active, key=lambda p: (abs(matrix.delta[p]), p))
        for m in range(math.floor(self._rate() * len(active)), -1, -1):
            pruned = set(smallest_first[:m])
            eligible = [p for p in ranked if not matrix.mask[p] or p in pruned]
            if len(eligible) >= m:
                break
        grown = eligible[:m]
        matrix.closing = Closing(
            {p: abs(matrix.delta[p]) for p in active},
            abs(matrix.delta[smallest_first[max(0, m - 1)]]),
            ranked,
            ranked[grown[-1]] if grown else math.inf,
        )
        before = matrix.second[active].mean()
        for p in pruned - set(grown):
            matrix.mask[p] = False
            matrix.delta[p] = matrix.first[p] = matrix.second[p] = 0.0
        kept = matrix.active
        fallback = matrix.second[kept].mean() if kept else before
        for p in grown:
            if p not in pruned:
                self._seed(matrix, p, fallback)
        matrix.candidates = None

    def _seed(self, matrix: Matrix, p: int, fallback: float) -> None:
        s = self.settings
        matrix.mask[p] = True
        matrix.delta[p] = 0.0
        if matrix.candidates is None:
            matrix.first[p], matrix.second[p] = 0.0, fallback
            return
        mean = matrix.sums[p] / matrix.window_steps
        if s.optimizer == "sgd":
            # The sum that a momentum buffer has built up since the run began.
            matrix.first[p] = mean * sum(s.momentum**n for n in range(self.steps)) if s.momentum else 0.0
            return
        matrix.first[p] = mean * (1 - s.betas[0] ** self.steps)
        matrix.second[p] = matrix.squares[p] / matrix.window_steps * (1 - s.betas[1] ** self.steps)


def _accumulate(matrix: Matrix, gradient: Array) -> None:
    """SM3-II on the active positions."""
    row, col, cols = matrix.row.copy(), matrix.col.copy(), matrix.col.size
    for p in matrix.active:
        i, j = divmod(p, cols)
        nu = min(row[i], col[j]) + gradient[p] ** 2
        matrix.row[i] = max(matrix.row[i], nu)
        matrix.col[j] = max(matrix.col[j], nu)
