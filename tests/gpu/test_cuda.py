"""Results on a GPU equal those on the CPU. Run with ``pytest -m gpu`` on a machine with a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from spiel_kernels import check_index_set
from spiel_peft import SM3, SparseDelta, SpIELConfig

pytestmark = pytest.mark.gpu


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 17)).double()


def train(device: str, growth: str, optimizer_class: type) -> dict[str, torch.Tensor]:
    """Indices and values after 14 steps in float64, on the CPU."""
    config = SpIELConfig(
        target_modules=["0", "2"], density=0.1, growth=growth, regrow_every=4, accumulation_steps=2, total_steps=14
    )
    model = get_peft_model(small_model().to(device), config)
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(14):
        x = torch.randn(8, 33, dtype=torch.float64, generator=generator).to(device)
        model(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("growth", ["accumulated_gradient", "momentum", "random"])
@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, SM3])
def test_training_picks_the_same_positions(growth: str, optimizer_class: type) -> None:
    ours, reference = (train(device, growth, optimizer_class) for device in ("cuda", "cpu"))
    for name, tensor in reference.items():
        if name.endswith("indices"):
            assert torch.equal(ours[name], tensor), name
        else:
            torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("make_layer", [lambda: nn.Linear(48, 80), lambda: nn.Conv2d(6, 10, 3, padding=1)])
def test_forward_and_backward(dtype: torch.dtype, tolerance: float, make_layer) -> None:
    torch.manual_seed(0)
    layer = make_layer()
    x = torch.randn(4, 48) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 9, 9)
    config = SpIELConfig(target_modules=["0"], density=0.2, init_weights=False)
    reference = get_peft_model(nn.Sequential(layer).double(), config)
    ours = copy.deepcopy(reference).to("cuda", dtype)
    grads = []
    for model, data in ((reference, x.double()), (ours, x.to("cuda", dtype))):
        data.requires_grad_(True)
        model(data).square().sum().backward()
        delta = next(m for m in model.modules() if isinstance(m, SparseDelta))
        grads.append((delta.values.grad.double().cpu(), data.grad.double().cpu()))
    for expected, found in zip(*grads, strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("growth", ["accumulated_gradient", "momentum"])
def test_four_bit_base_trains(growth: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(
        256, 512, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
    )
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(512, 8)).to("cuda")
    packed = model[0].weight.detach().clone()
    config = SpIELConfig(target_modules=["0"], r=4, growth=growth, regrow_every=4, accumulation_steps=2)
    model = get_peft_model(model, config)
    delta = next(m for m in model.modules() if isinstance(m, SparseDelta))
    before = delta.indices.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(8):
        model(torch.randn(16, 256, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(delta.indices, before)
    assert check_index_set(delta.indices, delta.numel) is None
    assert delta.values.dtype == torch.float32
    assert torch.equal(model.base_model.model[0].get_base_layer().weight, packed)
