"""SM3 against plain loops over SM3-II (Anil et al., 2019, algorithm 2), on deltas and on other parameters."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from support.adapters import deltas_of, first_delta, log_of, trainable
from support.runs import adapt, assert_same_run, batch, loss_of, train
from torch import Tensor, nn

from spiel_peft import SM3

LR, EPS = 0.05, 1e-8


class LoopSM3:
    """SM3-II by loops: an accumulator per index of each dimension, updated from the active entries only."""

    def __init__(self, values: np.ndarray, active: list[tuple[int, ...]], momentum: float, decay: float) -> None:
        self.values, self.active, self.momentum, self.decay = values.copy(), active, momentum, decay
        self.cover = [np.zeros(size) for size in values.shape]
        self.velocity = np.zeros_like(values)

    def step(self, gradient: np.ndarray) -> None:
        nu = {
            entry: min(self.cover[dim][i] for dim, i in enumerate(entry)) + float(gradient[entry]) ** 2
            for entry in self.active
        }
        for entry, value in nu.items():
            for dim, i in enumerate(entry):
                self.cover[dim][i] = max(self.cover[dim][i], value)
            update = float(gradient[entry]) / (value**0.5 + EPS)
            self.velocity[entry] = self.momentum * self.velocity[entry] + (1 - self.momentum) * update
            self.values[entry] *= 1 - LR * self.decay
            self.values[entry] -= LR * self.velocity[entry]


def entries(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, shape)))


def close(got: Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(got.detach().double(), torch.from_numpy(expected), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 3, 4), (1, 3, 1, 2)])
def test_dense_parameters(shape: tuple[int, ...], momentum: float, decay: float) -> None:
    parameter = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = SM3([parameter], lr=LR, momentum=momentum, weight_decay=decay)
    loop = LoopSM3(parameter.detach().numpy().reshape(shape or (1,)), entries(shape or (1,)), momentum, decay)
    for _ in range(5):
        parameter.grad = torch.randn(shape, dtype=torch.float64)
        optimizer.step()
        loop.step(parameter.grad.numpy().reshape(shape or (1,)))
        close(parameter.reshape(shape or (1,)), loop.values)
    sizes = sorted(t.numel() for name, t in optimizer.state[parameter].items() if name.startswith("accumulator"))
    assert sizes == sorted(shape or (1,))


@pytest.mark.parametrize("growth", ["none", "momentum"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_deltas(density: float, momentum: float, growth: str) -> None:
    """Accumulators cover the matrix's rows and columns; with momentum growth they are still updated once a step."""
    model = adapt(
        nn.Sequential(nn.Linear(6, 5)).double(),
        target_modules=["0"],
        density=density,
        growth=growth,
        accumulation_steps=100,
    )
    delta = first_delta(model)
    optimizer = SM3(trainable(model), lr=LR, momentum=momentum, weight_decay=0.1)
    active = [divmod(p, 6) for p in delta.indices.tolist()]
    loop = LoopSM3(np.zeros((5, 6)), active, momentum, 0.1)
    for number in range(1, 6):
        x, _ = batch(number, dtype=torch.float64)
        model(x).square().sum().backward()
        dense = np.zeros((5, 6))
        for entry, value in zip(active, delta.values.grad.tolist(), strict=True):
            dense[entry] = value
        optimizer.step()
        optimizer.zero_grad()
        loop.step(dense)
        close(model.base_model.model[0].get_delta_weight("default"), loop.values)
        close(delta.state.row, loop.cover[0])
        close(delta.state.col, loop.cover[1])
    assert "accumulator_0" not in optimizer.state[delta.values]


def test_a_full_index_set_is_dense_sm3() -> None:
    dense = nn.Linear(6, 5).double()
    model = adapt(nn.Sequential(dense), target_modules=["0"], density=1.0, growth="none")
    plain = nn.Parameter(dense.weight.detach().clone())
    optimizer, other = SM3(trainable(model), lr=LR), SM3([plain], lr=LR)
    for number in range(1, 6):
        x, _ = batch(number, dtype=torch.float64)
        model(x).square().sum().backward()
        nn.functional.linear(x, plain, dense.bias).square().sum().backward()
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
    adapted = dense.weight.detach() + model.base_model.model[0].get_delta_weight("default")
    torch.testing.assert_close(adapted, plain.detach(), rtol=1e-11, atol=1e-13)


def test_it_finds_the_indices_after_a_close() -> None:
    """Momentum growth under SM3: positions change, training goes on with the accumulators of the new ones."""
    model = adapt(growth="momentum", total_steps=60, density=0.3)
    optimizer = SM3(trainable(model), lr=0.3, momentum=0.9)
    before = loss_of(model, 7).item()
    for _ in range(40):
        train(model, optimizer, 1, first=7)
    assert sum(report.replaced for report in log_of(model)) > 30
    assert loss_of(model, 7).item() < 0.7 * before


def test_closure() -> None:
    parameter = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = SM3([parameter], lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 13.0
    torch.testing.assert_close(parameter.detach(), torch.tensor([2.5, -1.5]))


def test_parameters_without_gradient_are_left_alone() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SM3([used, unused], lr=0.1, weight_decay=0.5)
    used.square().sum().backward()
    optimizer.step()
    assert torch.equal(unused, torch.ones(2))
    assert unused not in optimizer.state


def test_groups_have_their_own_settings() -> None:
    slow, fast = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SM3([{"params": [slow], "lr": 0.0}, {"params": [fast]}], lr=0.1)
    (slow + fast).sum().backward()
    optimizer.step()
    assert torch.equal(slow, torch.ones(2))
    torch.testing.assert_close(fast.detach(), torch.full((2,), 0.9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_wide_accumulators(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(3, 2, dtype=dtype))
    optimizer = SM3([parameter], lr=0.1, momentum=0.5)
    for _ in range(3):
        parameter.grad = torch.full((3, 2), 1e-3, dtype=dtype)
        optimizer.step()
    assert {t.dtype for t in optimizer.state[parameter].values()} == {torch.float32}
    assert torch.isfinite(parameter).all()
    assert (parameter < 1).all()


def test_state_dict_round_trip() -> None:
    """Momentum and dense accumulators travel with the optimizer, a delta's own accumulators with the adapter."""

    def run(interrupt: bool) -> nn.Module:
        model = adapt(growth="momentum", total_steps=20, bias="all")
        optimizer = SM3(trainable(model), lr=0.02, momentum=0.9)
        train(model, optimizer, 5)
        if interrupt:
            buffer = io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            buffer.seek(0)
            optimizer = SM3(trainable(model), lr=0.02, momentum=0.9)
            optimizer.load_state_dict(torch.load(buffer, weights_only=True))
            for delta in deltas_of(model).values():
                delta.load_state_dict({**delta.state_dict(), **delta.state.tensors()})
        train(model, optimizer, 5, first=6)
        return model

    assert_same_run(run(True), run(False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, "lr must be at least 0, got -0.1"),
        ({"lr": float("nan")}, "lr must be at least 0, got nan"),
        ({"lr": 0.1, "momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"lr": 0.1, "momentum": -0.1}, r"momentum must be in \[0, 1\), got -0.1"),
        ({"lr": 0.1, "weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
        ({"lr": 0.1, "eps": 0.0}, "eps must be above 0, got 0.0"),
    ],
)
def test_bad_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SM3([nn.Parameter(torch.ones(1))], **settings)
