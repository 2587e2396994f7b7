"""Training holds 4 bytes each of value, index and gradient per delta, and optimizer state; the rest is temporary."""

from __future__ import annotations

import gc

import pytest
import torch
from peft import get_peft_model
from support.layers import Single, spiel_layer
from torch import Tensor, nn

from spiel_peft import SM3, SpIELConfig

SIZE, K = 300, 20_000
# Objects that do not grow with the number of deltas: accumulators of rows and columns, sums, steps, the input.
REST = 64 * SIZE


def held_bytes() -> int:
    """Bytes of all tensors alive in the process."""
    storages = {}
    for thing in gc.get_objects():
        # Other tests leave fake tensors behind, which have no memory.
        if type(thing) in (Tensor, nn.Parameter) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def bytes_per_delta(before: int) -> float:
    return (held_bytes() - before) / K


class Run:
    """Steps of a model of one linear layer; memory is measured after backward and after the step."""

    def __init__(self, growth: str, optimizer: str) -> None:
        torch.manual_seed(0)
        base = Single(nn.Linear(SIZE, SIZE, bias=False))
        gc.collect()
        self.before = held_bytes()
        config = SpIELConfig(
            num_deltas=K, target_modules=["layer"], growth=growth, regrow_every=6, accumulation_steps=3
        )
        self.model = get_peft_model(base, config).train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = SM3(parameters, lr=1e-3) if optimizer == "sm3" else torch.optim.AdamW(parameters, lr=1e-3)
        self.x = torch.randn(4, SIZE)

    def backward(self) -> float:
        """Run a forward and a backward pass; returns the bytes held per delta after them."""
        self.model(self.x).square().sum().backward()
        return bytes_per_delta(self.before)

    def step(self) -> float:
        """Step the optimizer; returns the bytes held per delta after it."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        return bytes_per_delta(self.before)


@pytest.mark.parametrize("growth, optimizer, state", [("accumulated_gradient", "adamw", 8), ("momentum", "sm3", 0)])
def test_bytes_per_delta(growth: str, optimizer: str, state: int) -> None:
    run = Run(growth, optimizer)
    gathers = growth == "accumulated_gradient"
    rest = REST / K
    for number in range(1, 13):
        in_window = gathers and (number - 1) % 6 < 3
        gradient = run.backward()
        # A window holds position, sum, square and this step's sum per candidate.
        optimizer_state = state if number > 1 else 0
        assert gradient <= 4 + 4 + 4 + optimizer_state + 16 * in_window + rest, number
        between = run.step()
        closes = number in (3, 9)
        assert between <= 4 + 4 + state + 12 * (in_window and not closes) + rest, number
    assert spiel_layer(run.model).spiel_delta["default"].run.log


def test_the_dtype_of_the_base_costs_nothing_per_delta() -> None:
    """The originals of the entries that deltas change are kept for the length of an operation only."""
    base = Single(nn.Linear(SIZE, SIZE, bias=False).bfloat16())
    before = held_bytes()
    config = SpIELConfig(num_deltas=K, target_modules=["layer"], growth="none")
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(4, SIZE).bfloat16()
    for _ in range(2):
        model(x).sum().backward()
        held = bytes_per_delta(before)
        optimizer.step()
        optimizer.zero_grad()
    assert held <= 4 + 4 + 4 + REST / K
    assert bytes_per_delta(before) <= 4 + 4 + REST / K
