"""Whole runs with every optimizer, compared with oracles whose entries never move."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from support.adapters import deltas_of, log_of, trainable
from support.models import mlp
from support.runs import adapt, loss_of
from torch import Tensor, nn

from optimizers.catalogue import BITSANDBYTES, OTHERS, SHARED, TORCH, Make
from optimizers.slots import Slots
from spiel_peft import SpIELOptimizer
from spiel_peft.delta import SparseDelta

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
STEPS, EVERY, WINDOW = 11, 4, 2
CLIP = 0.3


class Pair:
    """A run, and the dense gradients of the same weights by plain autograd."""

    def __init__(self, dtype: torch.dtype, **fields: Any) -> None:
        base = mlp(dtype)
        self.plain: nn.Module = copy.deepcopy(base)
        settings = {"density": 0.25, "total_steps": 24, "initial_regrow_rate": 0.6, "regrow_every": EVERY}
        self.model = adapt(base, **{**settings, "accumulation_steps": WINDOW, **fields})
        self.deltas, self.dtype = deltas_of(self.model), dtype
        self.start = {name: self.plain.get_submodule(name).weight.detach().clone() for name in self.deltas}

    def dense_gradients(self, number: int, factor: float) -> dict[str, Tensor]:
        for name, delta in self.deltas.items():
            dense = torch.zeros(delta.numel, dtype=self.dtype)
            dense[delta.indices.long()] = delta.values.detach()
            self.plain.get_submodule(name).weight.data = self.start[name] + dense.view(self.start[name].shape)
        self.plain.zero_grad()
        loss_of(self.plain, number, self.dtype).backward()
        return {name: self.plain.get_submodule(name).weight.grad.flatten().double() * factor for name in self.deltas}


def run(pair: Pair, optimizer: torch.optim.Optimizer, slots: dict[str, Slots], tolerance: float, sign: float) -> int:
    came = 0
    for number in range(1, STEPS + 1):
        (sign * loss_of(pair.model, number, pair.dtype)).backward()
        norm = nn.utils.clip_grad_norm_(trainable(pair.model), CLIP)
        gradients = pair.dense_gradients(number, sign * min(1.0, CLIP / (float(norm) + 1e-6)))
        optimizer.step()
        optimizer.zero_grad()
        for name, oracle in slots.items():
            oracle.step(gradients[name], in_window=(number - 1) % EVERY < WINDOW)
            if (number - WINDOW) % EVERY == 0:
                if pair.deltas[name].run.config.growth == "random":
                    oracle.window_steps = 0
                came += oracle.exchange(pair.deltas[name].indices.tolist())
            oracle.compare(optimizer, pair.deltas[name], tolerance)
    assert [report.step for report in log_of(pair.model)] == [2, 6, 10]
    return came


def check(name: str, make: Make, dtype: torch.dtype, tolerance: float, wrap: bool = False, **fields: Any) -> None:
    pair = Pair(dtype, **fields)
    slots = {module: Slots(name, make, delta) for module, delta in pair.deltas.items()}
    optimizer = make(trainable(pair.model))
    stepped = SpIELOptimizer(optimizer, pair.model) if wrap else optimizer
    sign = -1.0 if optimizer.param_groups[0].get("maximize") else 1.0
    assert run(pair, stepped, slots, tolerance, sign) > 30


@pytest.mark.parametrize("name", [*TORCH, *OTHERS])
def test_state_follows_the_positions(name: str) -> None:
    """float64: the oracle's state to the last digits, whatever the optimizer keeps."""
    check(name, {**TORCH, **OTHERS}[name], torch.float64, 1e-9)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_capturable(kind: type[Any], foreach: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For CUDA graphs; all that keeps its arithmetic on tensors of steps from a CPU is a check of the device."""
    for module in (sys.modules[base.__module__] for base in kind.__mro__):
        if hasattr(module, "_get_capturable_supported_devices"):
            monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    check("adamw", lambda params: kind(params, lr=0.02, capturable=True, foreach=foreach), torch.float64, 1e-9)


@pytest.mark.parametrize("name", list(BITSANDBYTES))
def test_bitsandbytes_in_32_bits(name: str) -> None:
    check(name, BITSANDBYTES[name], torch.float32, 2e-4)


@pytest.mark.parametrize(
    "name", ["adamw", "adamax", "sgd-momentum", "adagrad", "adadelta", "rmsprop", "rprop", "adafactor", "signed-mean"]
)
def test_without_a_window(name: str) -> None:
    """Random growth: first moments are zero, what divides is the mean over the kept entries."""
    check(name, {**TORCH, **OTHERS}[name], torch.float64, 1e-9, growth="random")


@pytest.mark.parametrize("name", ["adamw-fused", "sgd-nesterov", "adafactor", "two-iterates"])
def test_wrapped(name: str) -> None:
    check(name, {**TORCH, **OTHERS}[name], torch.float64, 1e-9, wrap=True)


def test_groups_keep_their_own_settings() -> None:
    """Another lr and other betas for each matrix: the state of each follows its own."""
    settings: list[dict[str, Any]] = [{"lr": 0.02, "betas": (0.9, 0.999)}, {"lr": 0.005, "betas": (0.5, 0.9)}]
    pair = Pair(torch.float64)
    makes = [lambda params, own=own: torch.optim.AdamW(params, **own) for own in settings]
    slots = {name: Slots("adamw", make, pair.deltas[name]) for name, make in zip(pair.deltas, makes, strict=True)}
    groups = [{"params": [delta.values], **own} for delta, own in zip(pair.deltas.values(), settings, strict=True)]
    assert run(pair, torch.optim.AdamW(groups), slots, 1e-9, 1.0) > 30


@pytest.mark.parametrize("name", list(SHARED))
@pytest.mark.parametrize("growth", ["accumulated_gradient", "momentum"])
def test_sm3(name: str, growth: str) -> None:
    """Its accumulators are those of rows and columns; only its momentum has entries to follow the positions."""
    model = adapt(mlp(torch.float64), density=0.25, growth=growth, total_steps=24, initial_regrow_rate=0.6)
    optimizer = SHARED[name](trainable(model))
    deltas, came = deltas_of(model), 0
    velocities: dict[str, dict[int, float]] = {module: {} for module in deltas}
    for number in range(1, STEPS + 1):
        loss_of(model, number, torch.float64).backward()
        expected = {module: velocities_after(delta, velocities[module]) for module, delta in deltas.items()}
        optimizer.step()
        optimizer.zero_grad()
        for module, delta in deltas.items():
            if "momentum" in name:
                found = optimizer.state[delta.values]["momentum_buffer"].tolist()
                velocities[module] = dict(zip(delta.indices.tolist(), found, strict=True))
                # What has just come stands still.
                wanted = {position: expected[module].get(position, 0.0) for position in velocities[module]}
                assert velocities[module] == pytest.approx(wanted, rel=1e-10)
                came += len(wanted.keys() - expected[module].keys())
            else:
                assert not optimizer.state.get(delta.values)
    assert [report.step for report in log_of(model)] == [2, 6, 10]
    assert came > 30 or "momentum" not in name


def velocities_after(delta: SparseDelta, before: dict[int, float]) -> dict[int, float]:
    """SM3's momentum of 0.9 by position, after a step on the present gradient."""
    row, col = delta.state.row, delta.state.col
    after = {}
    for position, g in zip(delta.indices.tolist(), delta.values.grad.tolist(), strict=True):
        i, j = divmod(position, delta.cols)
        nu = (0.0 if row is None else min(float(row[i]), float(col[j]))) + g * g
        after[position] = 0.9 * before.get(position, 0.0) + 0.1 * g / (nu**0.5 + 1e-8)
    return after
