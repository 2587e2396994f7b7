"""Optimizer state across a close: state of kept deltas moves bit for bit, grown deltas get the window's statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from support.runs import reseed
from torch import Tensor, nn

from spiel_peft import SM3
from spiel_peft.cycle.grown_seeds import GrownSeeds
from spiel_peft.cycle.optimizer_buffers import check_state

K = 40
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Signed(torch.optim.Optimizer):
    """An unknown optimizer with a signed buffer, a positive buffer, a scalar, and a counter per entry."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(drift=torch.zeros_like(p), scale=torch.zeros_like(p), total=torch.zeros(()))
                    state["age"] = torch.zeros(p.shape, dtype=torch.int64)
                state["drift"] += p.grad
                state["scale"] += p.grad.abs()
                state["total"] += 1
                state["age"] += 1
                p -= group["lr"] * state["drift"] / state["scale"]


OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "adamw-capturable": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd-dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "rmsprop-centered": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "sm3": lambda p: SM3(p, lr=0.1, momentum=0.9),
    "unknown": Signed,
}

FIRST = {"exp_avg"}
SECOND = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "variance"}


def stepped(make: Make, steps: int = 3, k: int = K, dtype: torch.dtype = torch.float32) -> tuple[Any, nn.Parameter]:
    parameter = nn.Parameter(torch.zeros(k, dtype=dtype))
    optimizer = make([parameter])
    for _ in range(steps):
        parameter.grad = torch.randn(k, dtype=dtype)
        optimizer.step()
    return optimizer, parameter


def exchange_of(k: int = K) -> tuple[Tensor, int]:
    """An exchange that permutes entries and grows every fourth one."""
    source = torch.randperm(k)
    grown = torch.arange(0, k, 4)
    source[grown] = -1 - torch.randperm(grown.numel())
    return source, grown.numel()


def seeds_of(m: int, steps: int = 3) -> GrownSeeds:
    mean = torch.randn(m)
    return GrownSeeds(mean, mean.square() + torch.rand(m), steps)


def per_entry(state: dict[str, Any], k: int = K) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if isinstance(t, Tensor) and t.shape == (k,)}


@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_kept_entries_move_bit_for_bit_and_grown_ones_are_harmless(name: str, windowed: bool) -> None:
    optimizer, parameter = stepped(OPTIMIZERS[name])
    source, m = exchange_of()
    state = optimizer.state[parameter]
    before, rest = copy.deepcopy(per_entry(state)), {n: v for n, v in state.items() if n not in per_entry(state)}
    rest = copy.deepcopy(rest)
    check_state([optimizer], parameter)
    reseed(optimizer, parameter, source, seeds_of(m) if windowed else None)
    kept = source >= 0
    for entry, tensor in per_entry(state).items():
        assert torch.equal(tensor[kept], before[entry][source[kept]]), entry
        assert torch.isfinite(tensor).all(), entry
        if entry in SECOND:
            assert (tensor > 0).all(), entry
    for entry, value in rest.items():
        assert torch.equal(torch.as_tensor(state[entry]), torch.as_tensor(value)), entry
    # The next updates of grown entries are as large as those of kept ones.
    parameter.data.zero_()
    parameter.grad = torch.randn(K)
    optimizer.step()
    moves = parameter.detach().abs()
    assert torch.isfinite(moves).all()
    assert moves[~kept].max() <= 30 * moves[kept].max()


@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "adamw-amsgrad", "nadam", "radam"])
@pytest.mark.parametrize("steps", [1, 5])
def test_seeds_make_the_corrected_estimates_the_window_means(name: str, steps: int) -> None:
    optimizer, parameter = stepped(OPTIMIZERS[name], steps)
    source, m = exchange_of()
    seeds = seeds_of(m)
    reseed(optimizer, parameter, source, seeds)
    state, slots = optimizer.state[parameter], source < 0
    order = -1 - source[slots]
    torch.testing.assert_close(state["exp_avg"][slots] / (1 - 0.9**steps), seeds.mean[order])
    for entry in SECOND & state.keys():
        torch.testing.assert_close(
            state[entry][slots] / (1 - 0.999**steps), seeds.mean_square[order], rtol=1e-4, atol=0
        )


@pytest.mark.parametrize(
    ("name", "entry", "factor"),
    [
        ("sgd-momentum", "momentum_buffer", 1 + 0.9 + 0.81),
        ("sgd-dampening", "momentum_buffer", 0.81 + 0.5 * (1 + 0.9)),
        ("rmsprop-centered", "momentum_buffer", 0.0),
        ("rmsprop-centered", "grad_avg", 0.0),
        ("sm3", "momentum_buffer", 0.0),
        ("rprop", "prev", 0.0),
        ("asgd", "ax", 0.0),
    ],
)
def test_other_first_moments(name: str, entry: str, factor: float) -> None:
    """SGD's buffer gets the sum over the three steps so far; buffers in other units than the gradient get zero."""
    optimizer, parameter = stepped(OPTIMIZERS[name])
    source, m = exchange_of()
    seeds = seeds_of(m)
    reseed(optimizer, parameter, source, seeds)
    got = optimizer.state[parameter][entry][source < 0]
    torch.testing.assert_close(got, seeds.mean[-1 - source[source < 0]] * factor)


@pytest.mark.parametrize(
    ("name", "entry"), [("rmsprop", "square_avg"), ("adadelta", "square_avg"), ("adafactor", "variance")]
)
def test_second_moments_without_correction_are_the_mean_square(name: str, entry: str) -> None:
    optimizer, parameter = stepped(OPTIMIZERS[name])
    source, m = exchange_of()
    seeds = seeds_of(m)
    reseed(optimizer, parameter, source, seeds)
    got = optimizer.state[parameter][entry][source < 0]
    torch.testing.assert_close(got, seeds.mean_square[-1 - source[source < 0]])


def test_adamax_norm_is_in_the_gradients_unit() -> None:
    optimizer, parameter = stepped(OPTIMIZERS["adamax"])
    source, m = exchange_of()
    seeds = seeds_of(m)
    reseed(optimizer, parameter, source, seeds)
    got = optimizer.state[parameter]["exp_inf"][source < 0]
    torch.testing.assert_close(got, seeds.mean_square.sqrt()[-1 - source[source < 0]])


@pytest.mark.parametrize(
    ("name", "entry", "windowed"),
    [
        ("adamw", "exp_avg_sq", False),
        ("adafactor", "variance", False),
        ("adagrad", "sum", False),
        ("adadelta", "acc_delta", True),
        ("unknown", "scale", True),
    ],
)
def test_without_a_measure_the_mean_of_the_kept(name: str, entry: str, windowed: bool) -> None:
    optimizer, parameter = stepped(OPTIMIZERS[name])
    source, m = exchange_of()
    kept = optimizer.state[parameter][entry][source[source >= 0]].mean()
    reseed(optimizer, parameter, source, seeds_of(m) if windowed else None)
    got = optimizer.state[parameter][entry][source < 0]
    torch.testing.assert_close(got, kept.expand(m))


def test_unknown_position_in_the_window() -> None:
    """A position that was no candidate gets a first moment of zero, and the mean second moment of kept entries."""
    optimizer, parameter = stepped(OPTIMIZERS["adamw"])
    source, m = exchange_of()
    nan = torch.full((m,), float("nan"))
    kept = optimizer.state[parameter]["exp_avg_sq"][source[source >= 0]].mean()
    reseed(optimizer, parameter, source, GrownSeeds(nan, nan, 3))
    state = optimizer.state[parameter]
    assert (state["exp_avg"][source < 0] == 0).all()
    torch.testing.assert_close(state["exp_avg_sq"][source < 0], kept.expand(m))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_second_moments_are_not_zero_in_low_precision(dtype: torch.dtype) -> None:
    optimizer, parameter = stepped(OPTIMIZERS["adamw"], dtype=dtype)
    source, m = exchange_of()
    reseed(optimizer, parameter, source, GrownSeeds(torch.full((m,), 1e-6), torch.full((m,), 1e-12), 3))
    assert (optimizer.state[parameter]["exp_avg_sq"] > 0).all()


def test_all_replaced_takes_the_mean_of_what_was_there() -> None:
    optimizer, parameter = stepped(OPTIMIZERS["adamw"])
    mean = optimizer.state[parameter]["exp_avg_sq"].mean()
    reseed(optimizer, parameter, -1 - torch.arange(K), None)
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg_sq"], mean.expand(K))


@pytest.mark.parametrize(
    ("entry", "tensor"),
    [
        ("factor", torch.zeros(2, K)),
        ("flat", torch.zeros(3 * K)),
        ("codes", torch.zeros(K, dtype=torch.uint8)),
        ("signed_codes", torch.zeros(K, dtype=torch.int8)),
        ("eighths", torch.zeros(K // 8)),
        ("stacked", {"both": torch.zeros(2, K)}),
        ("history", [torch.zeros(K)]),
    ],
)
def test_state_that_cannot_be_permuted_is_refused_by_name(entry: str, tensor: Any) -> None:
    optimizer, parameter = stepped(OPTIMIZERS["sgd"])
    optimizer.state[parameter][entry] = tensor
    with pytest.raises(TypeError, match=f"SGD keeps state '{entry}'.*growth='none'"):
        check_state([optimizer], parameter)


def test_a_single_delta_has_nothing_to_permute() -> None:
    optimizer, parameter = stepped(OPTIMIZERS["adamw"], k=1)
    check_state([optimizer], parameter)
    reseed(optimizer, parameter, torch.tensor([-1]), GrownSeeds(torch.ones(1), torch.ones(1), 3))
    assert float(optimizer.state[parameter]["step"]) == 3
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], torch.tensor([1 - 0.9**3]))
