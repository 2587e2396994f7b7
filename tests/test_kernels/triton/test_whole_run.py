"""Training runs in which every operation is a Triton kernel."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from spiel_kernels.dispatch import use_backend
from spiel_peft import SM3, SpIELConfig


def run(backend: str, growth: str, device: str) -> tuple[float, Tensor]:
    """Last loss, and indices of a small model's first layer; checks that its base weight has not changed."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(40, 70), nn.GELU(), nn.Linear(70, 8)).to(device)
    original = base[0].weight.detach().clone()
    config = SpIELConfig(
        target_modules=["0", "2"], density=0.1, growth=growth, regrow_every=4, accumulation_steps=2, total_steps=100
    )
    with use_backend(backend):
        model = get_peft_model(base, config).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = SM3(parameters, lr=1e-2) if growth == "momentum" else torch.optim.AdamW(parameters, lr=1e-2)
        generator = torch.Generator().manual_seed(1)
        for _ in range(8):
            loss = model(torch.randn(16, 40, generator=generator).to(device)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(base[0].base_layer.weight, original)
    return float(loss.detach()), base[0].spiel_delta["default"].indices


@pytest.mark.parametrize("growth", ["accumulated_gradient", "momentum"])
def test_kernels_train_as_pytorch_does(growth: str, device: str) -> None:
    torch.use_deterministic_algorithms(False)
    loss, indices = run("triton", growth, device)
    expected, expected_indices = run("torch", growth, device)
    assert abs(loss - expected) <= 1e-5 * expected
    assert torch.isin(indices, expected_indices).float().mean() > 0.98
