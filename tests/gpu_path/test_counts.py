"""Budgets of kernel launches and host waits on the path that a GPU takes: NF4 layers, Triton's kernels.

The numbers are counted in Triton's interpreter. They hold for any number of matrices and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import bitsandbytes as bnb
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from gpu_path.counting import Counts, counting
from spiel_kernels.dispatch import use_backend
from spiel_peft import SM3, SpIELConfig

WIDTH = 64


class Block(nn.Module):
    """The seven linear layers of a transformer block, with little between them."""

    def __init__(self, linear: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = (linear() for _ in range(7))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.q(x) * self.k(x) + self.v(x))
        return x + self.down(self.gate(x) * self.up(x))


def nf4() -> nn.Module:
    return bnb.nn.Linear4bit(WIDTH, WIDTH, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")


def plain() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)


@dataclass
class Step:
    """What one step of training took, and the linear layers that it went through."""

    counts: Counts
    linears: int

    @property
    def waits(self) -> int:
        # AdamW's counters of steps are on the CPU on a GPU too, where reading them waits for nothing.
        return sum(number for place, number in self.counts.waits.items() if not place.startswith("grown_seeds.py"))


def training(growth: str, blocks: int, micro_batches: int, steps: int, **fields: object) -> list[Step]:
    """Train and count, step by step. Two steps are in a window, then a close follows; every five steps."""
    torch.manual_seed(0)
    base = nn.Sequential(*(Block(nf4) for _ in range(blocks)))
    config = SpIELConfig(
        target_modules=["q", "k", "v", "o", "gate", "up", "down"],
        num_deltas=200,
        growth=growth,
        regrow_every=6,
        accumulation_steps=3,
        total_steps=100,
        **fields,
    )
    counted = []
    with use_backend("triton"):
        model = get_peft_model(base, config).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        if growth == "momentum":
            optimizer: torch.optim.Optimizer = SM3(parameters, lr=1e-2)
        else:
            optimizer = torch.optim.AdamW(parameters, lr=1e-2, foreach=True)
        for _ in range(steps):
            batches = [torch.randn(1, 48, WIDTH, requires_grad=True) for _ in range(micro_batches)]
            with counting() as counts:
                for x in batches:
                    model(x).square().mean().backward()
                optimizer.step()
            optimizer.zero_grad()
            counted.append(Step(counts, 7 * blocks))
    return counted


def launches_of_the_rest(blocks: int, micro_batches: int) -> int:
    """Launches of the same model with plain frozen layers, without those of its linear layers."""
    model = nn.Sequential(*(Block(plain) for _ in range(blocks)))
    batches = [torch.randn(1, 48, WIDTH, requires_grad=True) for _ in range(micro_batches)]
    with counting() as counts:
        for x in batches:
            model(x).square().mean().backward()
    return counts.launches.total() - counts.launches["mm"]


def per_linear(step: Step, blocks: int, micro_batches: int) -> float:
    return (step.counts.launches.total() - launches_of_the_rest(blocks, micro_batches)) / step.linears


WINDOW, CLOSE, AFTER, BETWEEN = 6, 8, 9, 10  # steps counted from 0: windows are steps 0-2, 6-8, ...


GROWTH = pytest.mark.parametrize("growth", ["accumulated_gradient", "momentum"])


@GROWTH
@pytest.mark.parametrize(("blocks", "micro_batches"), [(1, 1), (3, 1), (1, 3)])
def test_waits_do_not_depend_on_the_number_of_matrices_and_micro_batches(
    growth: str, blocks: int, micro_batches: int
) -> None:
    steps = training(growth, blocks, micro_batches, BETWEEN + 1)
    assert steps[BETWEEN].waits <= 1, steps[BETWEEN].counts.waits
    for number, step in enumerate(steps):
        assert step.waits <= 8, (number, step.counts.waits)


@pytest.mark.parametrize(("growth", "between"), [("accumulated_gradient", 10), ("momentum", 14)])
def test_launches(growth: str, between: int) -> None:
    """Launches for each linear layer, those of its own products and of the optimizer among them.

    After a close the gathers are planned anew.
    """
    steps = training(growth, 2, 1, BETWEEN + 1)
    assert per_linear(steps[BETWEEN], 2, 1) <= between, steps[BETWEEN].counts.launches
    assert per_linear(steps[CLOSE], 2, 1) <= 40, steps[CLOSE].counts.launches
    assert per_linear(steps[AFTER], 2, 1) <= between + 20, steps[AFTER].counts.launches
    assert steps[BETWEEN].counts.launches["_fold_4bit_kernel"] == 2 * 14


def test_a_forward_pass_is_two_launches_for_each_linear_layer() -> None:
    with use_backend("triton"):
        base = nn.Sequential(*(nf4() for _ in range(4)))
        config = SpIELConfig(target_modules=["0", "1", "2", "3"], num_deltas=200)
        model = get_peft_model(base, config).train()
        x = torch.randn(48, WIDTH, requires_grad=True)
        model(x)  # makes the plans
        with counting() as counts:
            model(x)
    assert counts.launches == {"_fold_4bit_kernel": 4, "mm": 4}
    assert not counts.waits
