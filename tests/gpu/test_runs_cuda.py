"""Whole runs on a GPU: adapted weights are copies in the workspace, and nothing is written to a base weight."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from spiel_kernels.dispatch import use_backend
from spiel_peft import SparseDelta, SpIELConfig
from spiel_peft.weights import folding

pytestmark = pytest.mark.gpu


def run(dtype: torch.dtype, growth: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model after 12 steps, its base weight before them, and the last loss."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(96, 200), nn.GELU(), nn.Linear(200, 8)).to("cuda", dtype)
    original = base[0].weight.detach().clone()
    config = SpIELConfig(
        target_modules=["0"], density=0.1, growth=growth, regrow_every=4, accumulation_steps=2, total_steps=100
    )
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        x = torch.randn(64, 96, generator=generator).to("cuda", dtype)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, original, loss.detach()


def delta_of(model: nn.Module) -> SparseDelta:
    return next(m for m in model.modules() if isinstance(m, SparseDelta))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("growth", ["accumulated_gradient", "momentum"])
def test_the_base_weight_is_as_it_was(dtype: torch.dtype, growth: str) -> None:
    model, original, _ = run(dtype, growth)
    weight = model.base_model.model[0].base_layer.weight.detach()
    assert torch.equal(weight, original)
    # Adding and subtracting a delta would show here, in the sign of a zero.
    weight[0, :4] = -0.0
    bits = weight.view(torch.uint8).clone()
    model(torch.randn(4, 96, device="cuda", dtype=dtype)).sum().backward()
    assert torch.equal(weight.view(torch.uint8), bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_gives_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    copied, _, loss = run(dtype, "accumulated_gradient")
    monkeypatch.setattr(folding, "can_fold", lambda parameter: True)
    in_place, original, other_loss = run(dtype, "accumulated_gradient")
    assert torch.equal(in_place.base_model.model[0].base_layer.weight, original)
    assert torch.equal(loss, other_loss)
    assert torch.equal(delta_of(copied).indices, delta_of(in_place).indices)
    assert torch.equal(delta_of(copied).values, delta_of(in_place).values)


def test_kernels_and_pytorch_train_alike() -> None:
    model, _, loss = run(torch.float32, "accumulated_gradient")
    with use_backend("torch"):
        reference, _, expected = run(torch.float32, "accumulated_gradient")
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0.0)
    same = torch.isin(delta_of(model).indices, delta_of(reference).indices).float().mean()
    assert same > 0.98


def test_two_runs_are_equal_bit_for_bit() -> None:
    (first, _, _), (second, _, _) = run(torch.bfloat16, "momentum"), run(torch.bfloat16, "momentum")
    assert torch.equal(delta_of(first).indices, delta_of(second).indices)
    assert torch.equal(delta_of(first).values, delta_of(second).values)
