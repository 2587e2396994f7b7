"""An oracle for optimizer state across closes: a dense vector of entries that never move.

Our deltas are sorted by position, so a close permutes them and what the optimizer keeps for them. Here a position that
leaves hands its slot to one that comes, and the slots of all others stay where they are: there is nothing to permute,
and so nothing to permute wrongly. What a new position starts with is found by experiment where a rule of the optimizer
can be had: the same optimizer takes as many steps on a constant gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from optimizers.catalogue import Make, parameter_like, per_entry
from spiel_peft.delta import SparseDelta

MEAN, SQUARE, FULL_SQUARE, ZERO, KEPT, LR = "mean", "square", "full square", "zero", "kept", "lr"
# What a grown entry starts with. MEAN, SQUARE: what steps on the mean, or on the root of the mean square, would have
# built up. FULL_SQUARE: the mean square, as the optimizer corrects nothing.
STARTS = {
    "exp_avg": MEAN,
    "exp_avg_sq": SQUARE,
    "max_exp_avg_sq": SQUARE,
    "exp_inf": SQUARE,
    "sum": SQUARE,
    "variance": SQUARE,
    "square_avg": FULL_SQUARE,
    "acc_delta": KEPT,
    "momentum_buffer": MEAN,
    "grad_avg": ZERO,
    "prev": ZERO,
    "ax": ZERO,
    "z": ZERO,
    "step_size": LR,
    "drift": ZERO,
    "magnitude": KEPT,
    "age": KEPT,
    "state1": MEAN,
    "state2": SQUARE,
}
SPECIAL = {
    ("rmsprop-centered", "momentum_buffer"): ZERO,
    ("sm3-momentum", "momentum_buffer"): ZERO,
    ("transformers-adafactor-beta1", "exp_avg"): ZERO,
    ("bnb-rmsprop", "state1"): FULL_SQUARE,
    ("bnb-adagrad", "state1"): SQUARE,
}


@dataclass
class Slots:
    """The oracle of one delta.

    Args:
        name: of the optimizer in the catalogue.
        make: its factory, with the settings of the delta's group.
        delta: read once, for the start.
    """

    name: str
    make: Make
    delta: SparseDelta
    positions: list[int] = field(init=False)
    sums: Tensor = field(init=False)
    squares: Tensor = field(init=False)
    window_steps: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        order = torch.randperm(self.delta.k)
        self.positions = self.delta.indices[order].tolist()
        self.values = parameter_like(self.delta.values[order])
        self.optimizer = self.make([self.values])
        self.clear_window()

    def clear_window(self) -> None:
        self.sums = torch.zeros(self.delta.numel, dtype=torch.float64)
        self.squares = torch.zeros(self.delta.numel, dtype=torch.float64)
        self.window_steps = 0

    def step(self, gradient: Tensor, in_window: bool) -> None:
        """One step on the dense gradient ``[numel]``."""
        self.values.grad = gradient[self.positions].to(self.values.dtype)
        self.optimizer.step()
        self.steps += 1
        if in_window:
            self.sums += gradient
            self.squares += gradient.square()
            self.window_steps += 1

    def exchange(self, positions: list[int]) -> int:
        """Set new positions; returns how many were grown."""
        came = sorted(set(positions) - set(self.positions))
        slots = [slot for slot, position in enumerate(self.positions) if position not in set(positions)]
        for slot, position in zip(slots, came, strict=True):
            self.positions[slot] = position
        if came:
            with torch.no_grad():
                self.values[slots] = 0
            self._start(slots, came)
        self.clear_window()
        return len(came)

    def _start(self, slots: list[int], came: list[int]) -> None:
        k = len(self.positions)
        windowed = self.window_steps > 0
        mean = self.sums[came] / max(1, self.window_steps)
        square = self.squares[came] / max(1, self.window_steps)
        kept = [slot for slot in range(k) if slot not in slots] or list(range(k))
        for name, rows in per_entry(self.optimizer.state[self.values], k).items():
            start = SPECIAL.get((self.name, name), STARTS[name])
            if not windowed:
                start = {MEAN: ZERO, SQUARE: KEPT, FULL_SQUARE: KEPT}.get(start, start)
            for number, row in enumerate(rows):
                if start == KEPT:
                    new = row[kept].double().mean().expand(len(came))
                elif start == LR:
                    new = torch.full((len(came),), float(self.optimizer.param_groups[0]["lr"]), dtype=torch.float64)
                elif start == FULL_SQUARE:
                    new = square
                elif start == ZERO:
                    new = torch.zeros(len(came))
                else:
                    new = self._built_up(mean if start == MEAN else square.sqrt(), name)[number]
                row[slots] = new.to(row)

    def _built_up(self, gradient: Tensor, name: str) -> Tensor:
        """Buffer `name`, ``[rows, m]``, after the steps so far with a constant gradient ``[m]``."""
        probe = nn.Parameter(torch.zeros(gradient.numel(), dtype=self.values.dtype))
        optimizer = self.make([probe])
        for _ in range(self.steps):
            probe.grad = gradient.to(probe.dtype, copy=True)
            optimizer.step()
            probe.data.zero_()  # weight decay would make it part of the gradient
        return optimizer.state[probe][name].view(-1, gradient.numel())

    def compare(self, optimizer: torch.optim.Optimizer, delta: SparseDelta, tolerance: float) -> None:
        """Compare optimizer state with the oracle's, position by position."""
        assert sorted(self.positions) == delta.indices.tolist()
        order = torch.tensor(self.positions).argsort()
        ours = {"values": delta.values.detach()[None], **per_entry(optimizer.state[delta.values], delta.k)}
        theirs = {"values": self.values.detach()[None], **per_entry(self.optimizer.state[self.values], delta.k)}
        assert ours.keys() == theirs.keys()
        for name, rows in ours.items():
            expected = theirs[name][:, order]
            error = (rows.double() - expected.double()).abs()
            allowed = tolerance * (expected.double().abs() + float(expected.abs().max()))
            assert (error <= allowed).all(), f"{name}: off by {float(error.max()):.3g} after {self.steps} steps"
