"""bitsandbytes' 8-bit optimizer state across a close."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional
import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise
from torch import Tensor, nn

from cycle.helpers import adapt, assert_sound, first_delta, indices_of, log_of, moved, trainable
from spiel_peft.cycle.moments import GrownSeeds, check_state, reseed_state

BLOCK = 256
K = 4096 + 300


def stepped(kind: type[Any], steps: int = 4, k: int = K) -> tuple[Any, nn.Parameter]:
    parameter = nn.Parameter(torch.zeros(k))
    optimizer = kind([parameter], lr=0.01)
    for _ in range(steps):
        parameter.grad = torch.randn(k) * 0.1
        optimizer.step()
    return optimizer, parameter


def dequantized(state: dict[str, Any], number: int) -> Tensor:
    code, absmax = state[f"qmap{number}"], state[f"absmax{number}"]
    return dequantize_blockwise(state[f"state{number}"], absmax=absmax, code=code, blocksize=BLOCK)


def largest_step(state: dict[str, Any], number: int, values: Tensor) -> Tensor:
    """For every value the wider of the two steps of its block's code next to it."""
    code, absmax = state[f"qmap{number}"].sort().values, state[f"absmax{number}"]
    scale = absmax.repeat_interleave(BLOCK)[: values.numel()]
    where = torch.searchsorted(code, values / scale).clamp(1, code.numel() - 2)
    below, above = code[where] - code[where - 1], code[where + 1] - code[where]
    return torch.maximum(below, above) * scale


def exchange_of(k: int) -> tuple[Tensor, int]:
    source = torch.randperm(k)
    grown = torch.randperm(k)[: k // 5]
    source[grown] = -1 - torch.arange(grown.numel())
    return source, grown.numel()


@pytest.mark.parametrize(
    ("kind", "roles"),
    [
        (bnb.optim.AdamW8bit, {1: "first", 2: "second"}),
        (bnb.optim.PagedAdamW8bit, {1: "first", 2: "second"}),
        (bnb.optim.Lion8bit, {1: "first"}),
        (bnb.optim.RMSprop8bit, {1: "second"}),
    ],
)
def test_entries_move_by_at_most_a_step_of_their_new_block(kind: type[Any], roles: dict[int, str]) -> None:
    optimizer, parameter = stepped(kind)
    state = optimizer.state[parameter]
    assert state["state1"].dtype == torch.uint8
    before = {number: dequantized(state, number) for number in roles}
    source, m = exchange_of(K)
    mean = torch.randn(m) * 0.05
    seeds = GrownSeeds(mean, mean.square() + 0.001)
    check_state(optimizer, parameter)
    reseed_state(optimizer, parameter, source, seeds)
    corrections = {"first": 1 - 0.9**4, "second": 1 - 0.999**4}
    if kind is bnb.optim.RMSprop8bit:
        corrections["second"] = 1.0
    for number, role in roles.items():
        after = dequantized(state, number)
        kept = source >= 0
        expected = torch.empty(K)
        expected[kept] = before[number][source[kept]]
        seed = seeds.mean if role == "first" else seeds.mean_square
        expected[~kept] = seed[-1 - source[~kept]] * corrections[role]
        assert ((after - expected).abs() <= largest_step(state, number, expected) + 1e-12).all(), number
        if role == "second":
            assert (after[(expected > 0)] > 0).all()


def nearest_code(values: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, SimpleNamespace]:
    """Rounds to the nearest code, zero included, as on a GPU; bitsandbytes' CPU tables never get near zero."""
    padded = torch.nn.functional.pad(values, (0, -values.numel() % blocksize)).view(-1, blocksize)
    absmax = padded.abs().amax(1)
    scaled = (padded / absmax[:, None]).flatten()[: values.numel()]
    packed = (scaled[:, None] - code).abs().argmin(1)
    return packed.to(torch.uint8), SimpleNamespace(absmax=absmax)


def test_a_tiny_second_moment_is_not_rounded_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes.functional, "quantize_blockwise", nearest_code)
    optimizer, parameter = stepped(bnb.optim.AdamW8bit)
    source, m = exchange_of(K)
    reseed_state(optimizer, parameter, source, GrownSeeds(torch.full((m,), 1e-6), torch.full((m,), 1e-12)))
    assert (dequantized(optimizer.state[parameter], 2)[source < 0] > 0).all()


def test_small_matrices_keep_float_state() -> None:
    optimizer, parameter = stepped(bnb.optim.AdamW8bit, k=300)
    source, m = exchange_of(300)
    before = optimizer.state[parameter]["state1"].clone()
    assert before.dtype == torch.float32
    reseed_state(optimizer, parameter, source, None)
    kept = source >= 0
    assert torch.equal(optimizer.state[parameter]["state1"][kept], before[source[kept]])
    assert (optimizer.state[parameter]["state1"][~kept] == 0).all()


def test_stacked_state_is_refused() -> None:
    optimizer, parameter = stepped(bnb.optim.AdEMAMix8bit)
    with pytest.raises(TypeError, match="AdEMAMix8bit keeps state 'state1'"):
        check_state(optimizer, parameter)


@pytest.mark.parametrize("kind", [bnb.optim.AdamW8bit, bnb.optim.Lion8bit])
def test_training_with_closes(kind: type[Any]) -> None:
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(80, 100)), target_modules=["0"], density=0.6, total_steps=20)
    delta, start = first_delta(model), indices_of(model)["0"]
    optimizer = kind(trainable(model), lr=0.003)
    x = torch.randn(64, 80)
    y = x @ torch.randn(80, 100) * 0.1
    losses = []
    for _ in range(12):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        assert_sound(delta, 4800)
    assert optimizer.state[delta.values]["state1"].dtype == torch.uint8
    assert moved(start, delta.indices) > 100
    assert len(log_of(model)) == 3
    assert losses[-1] < 0.8 * losses[0]
