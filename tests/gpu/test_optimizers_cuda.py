"""Optimizer state across closes on a GPU: optimizers and layouts of state that exist only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cycle.test_moments_8bit import check_quantized
from support.adapters import deltas_of, trainable
from support.models import mlp
from support.runs import adapt, batch

pytestmark = pytest.mark.gpu

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 0.02}),
    "adamw-fused": (torch.optim.AdamW, {"lr": 0.02, "fused": True}),
    "adamw-capturable": (torch.optim.AdamW, {"lr": 0.02, "capturable": True}),
    "adamw-amsgrad-fused": (torch.optim.AdamW, {"lr": 0.02, "amsgrad": True, "fused": True}),
    "nadam-capturable": (torch.optim.NAdam, {"lr": 0.02, "capturable": True}),
    "radam-capturable": (torch.optim.RAdam, {"lr": 0.02, "capturable": True}),
    "adamax": (torch.optim.Adamax, {"lr": 0.02}),
    # These optimizers write into the gradient.
    "sgd-nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "adafactor": (torch.optim.Adafactor, {"lr": 0.05}),
}


def run(name: str, device: str) -> dict[str, torch.Tensor]:
    """Indices, values and state after 11 steps and three closes in float64."""
    model = adapt(mlp(torch.float64).to(device), density=0.25, total_steps=24, initial_regrow_rate=0.6)
    kind, settings = OPTIMIZERS[name]
    if device == "cpu":
        settings = {key: value for key, value in settings.items() if key != "capturable"}
    optimizer = kind(trainable(model), **settings)
    for number in range(1, 12):
        x, y = (tensor.to(device) for tensor in batch(number, dtype=torch.float64))
        (model(x) - y).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trainable(model), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    out = {}
    for module, delta in deltas_of(model).items():
        state = {key: t for key, t in optimizer.state[delta.values].items() if isinstance(t, torch.Tensor)}
        for key, tensor in {"indices": delta.indices, "values": delta.values.detach(), **state}.items():
            out[f"{module}.{key}"] = tensor.cpu()
    return out


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_same_state_as_on_the_cpu(name: str) -> None:
    ours, reference = run(name, "cuda"), run(name, "cpu")
    assert ours.keys() == reference.keys()
    for key, tensor in reference.items():
        if key.endswith("indices"):
            assert torch.equal(ours[key], tensor), key
        else:
            torch.testing.assert_close(ours[key].double(), tensor.double(), rtol=1e-6, atol=1e-9, msg=key)


# Number of deltas: enough for paged memory, and a multiple of the block size, as AdEMAMix needs.
@pytest.mark.parametrize(
    ("name", "k"),
    [
        ("AdamW8bit", 4396),
        ("Lion8bit", 4396),
        ("RMSprop8bit", 4396),
        ("AdEMAMix8bit", 4096),
        ("PagedAdamW8bit", 200_300),
        ("PagedLion8bit", 200_300),
        ("PagedAdEMAMix8bit", 204_800),
    ],
)
def test_quantized_state(name: str, k: int) -> None:
    check_quantized(name, k, "cuda")
