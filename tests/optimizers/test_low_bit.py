"""Optimizer state that dequantizes itself: torchao's optimizers, if installed, and a minimal one.

`make test` runs this file once more with torchao on the path; the other tests do without, as PEFT and transformers
behave differently where they find it.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.adapters import first_delta, indices_of, log_of, trainable
from support.runs import adapt, assert_sound, moved, reseed
from torch import Tensor, nn

from spiel_peft.cycle.grown_seeds import GrownSeeds

K, STEPS, BLOCK = 8192, 4, 128
TORCHAO = ["AdamW8bit", "AdamW4bit", "AdamWFp8"]
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
KINDS = ["LinearAdam", *(pytest.param(name, marks=needs_torchao) for name in TORCHAO)]


class LinearCodes(Tensor):
    """Numbers in blocks of 128, each rounded to 127ths of its block's largest; looks like an ordinary tensor."""

    codes: Tensor
    scale: Tensor
    block_size = BLOCK
    qmap = torch.arange(-127, 128) / 127.0

    @staticmethod
    def __new__(cls, values: Tensor) -> LinearCodes:
        self = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)
        self.codes = torch.zeros(values.shape, dtype=torch.int8)
        self.scale = torch.zeros(values.numel() // BLOCK)
        return self

    def dequantize(self) -> Tensor:
        return (self.codes.view(-1, BLOCK) / 127.0 * self.scale[:, None]).flatten()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.ops.aten.copy_.default:
            raise NotImplementedError(f"{function} on quantized state")
        self, values = args
        blocks = values.view(-1, BLOCK)
        self.scale.copy_(blocks.abs().amax(1))
        self.codes.copy_((blocks / self.scale[:, None].clamp(min=1e-30) * 127).round().flatten())
        return self


class LinearAdam(torch.optim.Optimizer):
    """Adam whose state is `LinearCodes`."""

    def __init__(self, params: Any, lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=torch.zeros(()), exp_avg=LinearCodes(p), exp_avg_sq=LinearCodes(p))
                state["step"] += 1
                average = state["exp_avg"].dequantize().lerp(p.grad, 1 - first)
                square = state["exp_avg_sq"].dequantize().lerp(p.grad.square(), 1 - second)
                state["exp_avg"].copy_(average)
                state["exp_avg_sq"].copy_(square)
                steps = float(state["step"])
                root = (square / (1 - second**steps)).sqrt() + 1e-8
                p.sub_(average / (1 - first**steps) / root, alpha=group["lr"])


def make(name: str, params: Any, lr: float) -> Any:
    if name == "LinearAdam":
        return LinearAdam(params, lr=lr)
    import torchao.optim

    return getattr(torchao.optim, name)(params, lr=lr)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """These optimizers compile their step; what they keep is the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


def stepped(name: str, k: int = K) -> tuple[Any, nn.Parameter]:
    parameter = nn.Parameter(torch.zeros(k))
    optimizer = make(name, [parameter], lr=0.01)
    for _ in range(STEPS):
        parameter.grad = torch.randn(k) * 0.1
        optimizer.step()
    return optimizer, parameter


def exchange() -> tuple[Tensor, GrownSeeds, Tensor]:
    source = torch.randperm(K)
    grown = torch.randperm(K)[: K // 5]
    source[grown] = -1 - torch.arange(grown.numel())
    mean = torch.randn(grown.numel()) * 0.05
    return source, GrownSeeds(mean, mean.square() + 0.001, STEPS), source >= 0


@pytest.mark.parametrize("name", KINDS)
def test_entries_are_what_their_new_block_makes_of_them(name: str) -> None:
    """The oracle: torchao's own quantization of the entries in their new order."""
    optimizer, parameter = stepped(name)
    state = optimizer.state[parameter]
    source, seeds, kept = exchange()
    seeded = {"exp_avg": seeds.mean * (1 - 0.9**STEPS), "exp_avg_sq": seeds.mean_square * (1 - 0.999**STEPS)}
    expected = {}
    for entry, values in seeded.items():
        before = state[entry].dequantize()
        expected[entry] = torch.empty(K)
        expected[entry][kept] = before[source[kept]]
        expected[entry][~kept] = values[-1 - source[~kept]]
    other, another = stepped(name)
    fresh = other.state[another]
    reseed(optimizer, parameter, source, seeds)
    for entry, wanted in expected.items():
        fresh[entry].copy_(wanted)
        allowed = (fresh[entry].dequantize() - wanted).abs()
        error = (state[entry].dequantize() - wanted).abs()
        lifted = (fresh[entry].dequantize() == 0) & (wanted > 0) & (entry == "exp_avg_sq")
        assert (error[~lifted] <= allowed[~lifted] * 1.0001 + 1e-12).all(), entry
        if entry == "exp_avg_sq":
            assert (state[entry].dequantize()[wanted > 0] > 0).all()
    assert type(state["exp_avg"]) is type(fresh["exp_avg"])
    assert float(state["step"]) == STEPS


@pytest.mark.parametrize("name", KINDS)
def test_a_tiny_second_moment_is_not_rounded_to_zero(name: str) -> None:
    optimizer, parameter = stepped(name)
    source, seeds, kept = exchange()
    square = torch.full(seeds.mean.shape, 1e-12)
    square[::2] = 1e6
    before = optimizer.state[parameter]["exp_avg_sq"].dequantize()
    reseed(optimizer, parameter, source, GrownSeeds(seeds.mean, square, STEPS))
    after = optimizer.state[parameter]["exp_avg_sq"].dequantize()
    assert (after[~kept] > 0).all()
    assert (after[kept][before[source[kept]] > 0] > 0).all()


@needs_torchao
def test_what_is_too_odd_to_be_quantized_stays_exact() -> None:
    optimizer, parameter = stepped("AdamW8bit", K - 1)
    state = optimizer.state[parameter]
    before = state["exp_avg"].clone()
    source = torch.randperm(K - 1)
    reseed(optimizer, parameter, source, None)
    assert torch.equal(state["exp_avg"], before[source])


@pytest.mark.parametrize("name", KINDS)
def test_training_with_closes(name: str) -> None:
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(80, 128)), target_modules=["0"], density=0.6, total_steps=20)
    delta, start = first_delta(model), indices_of(model)["0"]
    optimizer = make(name, trainable(model), lr=0.003)
    x = torch.randn(64, 80)
    y = x @ torch.randn(80, 128) * 0.1
    losses = []
    for _ in range(12):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        assert_sound(delta, 6144)
    assert hasattr(optimizer.state[delta.values]["exp_avg"], "codes")
    assert moved(start, delta.indices) > 100
    assert len(log_of(model)) == 3
    assert math.isfinite(losses[-1]) and losses[-1] < 0.8 * losses[0]
