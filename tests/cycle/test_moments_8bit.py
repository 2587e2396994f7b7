"""bitsandbytes' optimizer state across a close, in 8 and in 32 bits."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional
import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise
from support.adapters import first_delta, indices_of, log_of, trainable
from support.quantized import needs_bitsandbytes_050
from support.runs import adapt, assert_sound, moved, reseed
from torch import Tensor, nn

from spiel_peft.cycle.grown_seeds import GrownSeeds
from spiel_peft.cycle.optimizer_buffers import buffers_of

BLOCK = 256
K = 4096 + 300
STEPS = 4
# Paged optimizers are ordinary ones on a CPU, and say so.
pytestmark = [
    needs_bitsandbytes_050,
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
]


def stepped(
    kind: type[Any], steps: int = STEPS, k: int = K, device: str = "cpu", **settings: Any
) -> tuple[Any, nn.Parameter]:
    parameter = nn.Parameter(torch.zeros(k, device=device))
    optimizer = kind([parameter], lr=0.01, **settings)
    for _ in range(steps):
        parameter.grad = torch.randn(k, device=device) * 0.1
        optimizer.step()
    return optimizer, parameter


def rows(state: dict[str, Any], number: int) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales of each average that shares state `number`."""
    codes, scales = state[f"state{number}"], state[f"absmax{number}"]
    return [(codes, scales)] if codes.dim() == 1 else list(zip(codes, scales, strict=True))


def dequantized(state: dict[str, Any], number: int) -> Tensor:
    """``[rows, k]``"""
    code = state[f"qmap{number}"]
    return torch.stack(
        [dequantize_blockwise(c.to(s.device), absmax=s, code=code, blocksize=BLOCK) for c, s in rows(state, number)]
    )


def largest_step(state: dict[str, Any], number: int, row: int, values: Tensor) -> Tensor:
    """For every value, the larger distance to a neighbouring code of its block."""
    code, (_, absmax) = state[f"qmap{number}"].sort().values, rows(state, number)[row]
    scale = absmax.repeat_interleave(BLOCK)[: values.numel()]
    where = torch.searchsorted(code, values / scale).clamp(1, code.numel() - 2)
    below, above = code[where] - code[where - 1], code[where + 1] - code[where]
    return torch.maximum(below, above) * scale


def exchange_of(k: int, device: str = "cpu") -> tuple[Tensor, int]:
    source = torch.randperm(k, device=device)
    grown = torch.randperm(k, device=device)[: k // 5]
    source[grown] = -1 - torch.arange(grown.numel(), device=device)
    return source, grown.numel()


def seeds_of(m: int, device: str = "cpu") -> GrownSeeds:
    mean = torch.randn(m, device=device) * 0.05
    return GrownSeeds(mean, mean.square() + 0.001, STEPS)


FAST, SLOW, SQUARE = 1 - 0.9**STEPS, 1 - 0.9999**STEPS, 1 - 0.999**STEPS
# By how much the window's mean (or, where "square", its mean square) is multiplied, row by row of each state.
KINDS: dict[str, dict[int, list[tuple[str, float]]]] = {
    "AdamW": {1: [("mean", FAST)], 2: [("square", SQUARE)]},
    "Adam": {1: [("mean", FAST)], 2: [("square", SQUARE)]},
    "LAMB": {1: [("mean", FAST)], 2: [("square", SQUARE)]},
    "AdEMAMix": {1: [("mean", FAST), ("mean", SLOW)], 2: [("square", SQUARE)]},
    "Lion": {1: [("mean", 1 - 0.99**STEPS)]},
    "RMSprop": {1: [("square", 1.0)]},
    "Adagrad": {1: [("square", STEPS)]},
    "SGD": {1: [("mean", 1 + 0.9 + 0.81 + 0.729)]},
    "LARS": {1: [("mean", 1 + 0.9 + 0.81 + 0.729)]},
}
NEEDS_MOMENTUM = {"SGD", "LARS"}
PAGED = ["AdamW", "Adam", "Lion", "AdEMAMix"]


def kind_of(name: str) -> tuple[type[Any], dict[str, Any]]:
    plain = name.removeprefix("Paged").removesuffix("8bit")
    return getattr(bnb.optim, name), {"momentum": 0.9} if plain in NEEDS_MOMENTUM else {}


def expected_rows(before: Tensor, source: Tensor, seeds: GrownSeeds, factors: list[tuple[str, float]]) -> Tensor:
    out = torch.empty_like(before)
    kept = source >= 0
    for row, old, (what, factor) in zip(out, before, factors, strict=True):
        seed = seeds.mean if what == "mean" else seeds.mean_square
        row[kept] = old[source[kept]]
        row[~kept] = seed[-1 - source[~kept]] * factor
    return out


@pytest.mark.parametrize("name", [f"{name}8bit" for name in KINDS] + [f"Paged{name}8bit" for name in PAGED])
def test_entries_move_by_at_most_a_step_of_their_new_block(name: str) -> None:
    check_quantized(name, K, "cpu")


def check_quantized(name: str, k: int, device: str) -> None:
    kind, settings = kind_of(name)
    optimizer, parameter = stepped(kind, k=k, device=device, **settings)
    factors = KINDS[name.removeprefix("Paged").removesuffix("8bit")]
    state = optimizer.state[parameter]
    assert state["state1"].dtype == torch.uint8
    before = {number: dequantized(state, number) for number in factors}
    source, m = exchange_of(k, device)
    seeds = seeds_of(m, device)
    reseed(optimizer, parameter, source, seeds)
    for number, of_rows in factors.items():
        expected = expected_rows(before[number], source, seeds, of_rows)
        for row, (got, wanted) in enumerate(zip(dequantized(state, number), expected, strict=True)):
            error = (got - wanted).abs()
            assert (error <= largest_step(state, number, row, wanted) + 1e-12).all(), (number, row)
            if of_rows[row][0] == "square":
                assert (got[wanted > 0] > 0).all()


@pytest.mark.parametrize("name", [*KINDS, *(f"Paged{name}" for name in PAGED)])
def test_state_in_32_bits_is_exact(name: str) -> None:
    kind, settings = kind_of(name)
    optimizer, parameter = stepped(kind, k=300, **settings)
    factors = KINDS[name.removeprefix("Paged")]
    state = optimizer.state[parameter]
    before = {n: state[f"state{n}"].clone().view(-1, 300) for n in factors}
    source, m = exchange_of(300)
    seeds = seeds_of(m)
    reseed(optimizer, parameter, source, seeds)
    kept = source >= 0
    for number, of_rows in factors.items():
        got, expected = state[f"state{number}"].view(-1, 300), expected_rows(before[number], source, seeds, of_rows)
        assert torch.equal(got[:, kept], expected[:, kept])
        torch.testing.assert_close(got[:, ~kept], expected[:, ~kept])
    assert state["step"] == STEPS


@pytest.mark.parametrize("t_beta3", [3, 6, 1000])
def test_a_scheduled_slow_average_is_what_steps_on_the_mean_make_it(t_beta3: int) -> None:
    """The oracle is AdEMAMix's own update with the window's mean as a constant gradient."""
    steps = 7
    optimizer, parameter = stepped(bnb.optim.AdEMAMix, steps, k=40, t_beta3=t_beta3, t_alpha=5)
    source, m = exchange_of(40)
    seeds = seeds_of(m)
    reseed(optimizer, parameter, source, seeds)
    other = nn.Parameter(torch.zeros(m))
    reference = bnb.optim.AdEMAMix([other], lr=0.01, t_beta3=t_beta3, t_alpha=5)
    for _ in range(steps):
        other.grad = seeds.mean.clone()
        reference.step()
    got = optimizer.state[parameter]["state1"][:, source < 0]
    torch.testing.assert_close(got, reference.state[other]["state1"][:, -1 - source[source < 0]], rtol=1e-4, atol=1e-9)


def nearest_code(values: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, SimpleNamespace]:
    """Rounds to the nearest code, as on a GPU, zero included; bitsandbytes' tables for CPUs never round to zero."""
    padded = torch.nn.functional.pad(values, (0, -values.numel() % blocksize)).view(-1, blocksize)
    absmax = padded.abs().amax(1)
    scaled = (padded / absmax[:, None]).flatten()[: values.numel()]
    packed = (scaled[:, None] - code).abs().argmin(1)
    return packed.to(torch.uint8), SimpleNamespace(absmax=absmax)


@pytest.mark.parametrize("kind", [bnb.optim.AdamW8bit, bnb.optim.RMSprop8bit])
def test_a_tiny_second_moment_is_not_rounded_to_zero(monkeypatch: pytest.MonkeyPatch, kind: type[Any]) -> None:
    """No small second moment is rounded to zero, of a grown entry or of one that moves to a block with large ones."""
    monkeypatch.setattr(bitsandbytes.functional, "quantize_blockwise", nearest_code)
    optimizer, parameter = stepped(kind)
    number = 2 if kind is bnb.optim.AdamW8bit else 1
    source, m = exchange_of(K)
    square = torch.full((m,), 1e-12)
    square[::2] = 1e6
    reseed(optimizer, parameter, source, GrownSeeds(torch.full((m,), 1e-6), square, STEPS))
    assert (dequantized(optimizer.state[parameter], number) > 0).all()


@pytest.mark.parametrize("kind", [bnb.optim.AdamW8bit, bnb.optim.AdEMAMix8bit])
def test_as_many_deltas_as_a_code_table_has_entries(kind: type[Any]) -> None:
    """With as many deltas as codes, the table of codes looks like state per entry; it is shared and must not change."""
    optimizer, parameter = stepped(kind, k=256, min_8bit_size=0)
    state = optimizer.state[parameter]
    assert state["state1"].dtype == torch.uint8
    tables = {name: state[name].clone() for name in ("qmap1", "qmap2")}
    source, m = exchange_of(256)
    reseed(optimizer, parameter, source, seeds_of(m))
    assert [buffer.name for buffer in buffers_of(optimizer, parameter)] == ["state1", "state2"]
    for name, table in tables.items():
        assert torch.equal(state[name], table)


def test_norms_are_left_alone() -> None:
    optimizer, parameter = stepped(bnb.optim.LAMB, k=100, max_unorm=1.0)
    state = optimizer.state[parameter]
    state["gnorm_vec"] = torch.arange(100.0)  # as long as the parameter, and of the whole update
    norm = state["unorm_vec"].clone()
    source, m = exchange_of(100)
    reseed(optimizer, parameter, source, seeds_of(m))
    assert torch.equal(state["gnorm_vec"], torch.arange(100.0))
    assert torch.equal(state["unorm_vec"], norm)


def on_a_gpu(tensor: Tensor) -> Any:
    """A tensor that says it is on a GPU."""
    return SimpleNamespace(device=SimpleNamespace(type="cuda"), shape=tensor.shape)


def test_mixed_up_scales_on_a_gpu_are_refused_by_name() -> None:
    """The GPU kernel reads the scales of the second average half a block too early."""
    optimizer, parameter = stepped(bnb.optim.AdEMAMix8bit)
    optimizer.state[parameter]["absmax1"] = on_a_gpu(optimizer.state[parameter]["absmax1"])
    with pytest.raises(TypeError, match="AdEMAMix8bit keeps state 'state1' of 4396 deltas .* multiple of 256"):
        buffers_of(optimizer, parameter)
    optimizer, parameter = stepped(bnb.optim.AdEMAMix8bit, k=4096)
    optimizer.state[parameter]["absmax1"] = on_a_gpu(optimizer.state[parameter]["absmax1"])
    assert len(buffers_of(optimizer, parameter)) == 2


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit", "AdEMAMix8bit"])
def test_training_with_closes(name: str) -> None:
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(80, 100)), target_modules=["0"], density=0.6, total_steps=20)
    delta, start = first_delta(model), indices_of(model)["0"]
    optimizer = getattr(bnb.optim, name)(trainable(model), lr=0.003)
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
    assert math.isfinite(losses[-1]) and losses[-1] < 0.8 * losses[0]
