"""Models of one layer with SpIEL adapters, and the same layers computed by the dense formula."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spiel_peft import SpIELConfig, SpIELLayer

HALF_AND_FULL = [torch.float32, torch.bfloat16, torch.float16]


class Single(nn.Module):
    """A model of one layer, `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapt(layer: nn.Module, k: int = 7, adapters: tuple[str, ...] = ("default",), **config: Any) -> PeftModel:
    """A PEFT model of one layer with random deltas; every adapter has other positions, and all are active."""
    config = {"target_modules": ["layer"], "init_weights": False, "growth": "none", **config}
    model: PeftModel | None = None
    for number, name in enumerate(adapters):
        settings = SpIELConfig(num_deltas=k, seed=number, **config)
        if model is None:
            model = get_peft_model(Single(layer), settings, adapter_name=name)
        else:
            model.add_adapter(name, settings)
    model.base_model.set_adapter(list(adapters))
    return model


def spiel_layer(model: nn.Module) -> SpIELLayer:
    """The only SpIEL layer of a model."""
    (layer,) = (module for module in model.modules() if isinstance(module, SpIELLayer))
    return layer


def values_of(model: nn.Module, adapter: str = "default") -> nn.Parameter:
    """The values of an adapter in a model of one layer."""
    return spiel_layer(model).spiel_delta[adapter].values


def dense_delta(layer: SpIELLayer, adapter: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """An adapter's delta as a dense leaf tensor, filled entry by entry."""
    delta = layer.spiel_delta[adapter]
    dense = torch.zeros(layer.info.numel, dtype=dtype)
    for position, value in zip(delta.indices.tolist(), delta.values.tolist(), strict=True):
        dense[position] = value
    return dense.view(layer.info.weight_shape).requires_grad_()


@dataclass
class Dense:
    """Output and gradients of the dense formula ``W + sum of deltas`` in float64."""

    out: Tensor
    grad_input: Tensor | None
    grad_bias: Tensor | None
    grad_weight: Tensor
    grad_values: dict[str, Tensor]


def dense_formula(
    layer: SpIELLayer, reference: nn.Module, weight: Tensor, x: Tensor, grad_out: Tensor, adapters: tuple[str, ...]
) -> Dense:
    """Run `reference`, a float64 layer, with the adapted weight in place of its own, by plain autograd."""
    deltas = {name: dense_delta(layer, name) for name in adapters}
    weight = weight.detach().double().requires_grad_()
    bias = getattr(reference, "bias", None)
    tensors = {"weight": weight + sum(deltas.values())}
    if bias is not None:
        bias = bias.detach().double().requires_grad_()
        tensors["bias"] = bias
    if x.is_floating_point():
        x = x.detach().double().requires_grad_()
    out = torch.func.functional_call(reference, tensors, (x,))
    out.backward(grad_out.double())
    grads = {
        name: delta.grad.flatten()[layer.spiel_delta[name].indices.to(torch.int64)] for name, delta in deltas.items()
    }
    grad_bias = bias.grad if bias is not None else None
    return Dense(out.detach(), x.grad if x.is_floating_point() else None, grad_bias, weight.grad, grads)


@dataclass(frozen=True)
class LayerCase:
    """A kind of layer and an input for it."""

    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
        layer, x = self.make().to(dtype), self.x()
        return layer, x.to(dtype) if x.is_floating_point() else x


def transposed(rows: int, cols: int) -> Conv1D:
    """transformers' Conv1D with a random bias."""
    layer = Conv1D(cols, rows)
    nn.init.normal_(layer.bias)
    return layer


def ids(*shape: int, below: int = 11) -> Tensor:
    """Random inputs of an embedding."""
    return torch.randint(below, shape)


CASES: dict[str, LayerCase] = {
    "linear": LayerCase(lambda: nn.Linear(9, 13), lambda: torch.randn(2, 5, 9)),
    "linear-no-bias": LayerCase(lambda: nn.Linear(9, 13, bias=False), lambda: torch.randn(5, 9)),
    "linear-vector": LayerCase(lambda: nn.Linear(9, 13), lambda: torch.randn(9)),
    "linear-one-row": LayerCase(lambda: nn.Linear(9, 1), lambda: torch.randn(4, 9)),
    "transposed": LayerCase(lambda: transposed(9, 13), lambda: torch.randn(2, 5, 9)),
    "embedding": LayerCase(lambda: nn.Embedding(11, 6), lambda: ids(3, 7)),
    "embedding-padding": LayerCase(lambda: nn.Embedding(11, 6, padding_idx=2), lambda: ids(3, 7)),
    "embedding-frequency": LayerCase(lambda: nn.Embedding(11, 6, scale_grad_by_freq=True), lambda: ids(3, 7)),
    "conv1d": LayerCase(lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 10)),
    "conv2d": LayerCase(lambda: nn.Conv2d(3, 8, 3, stride=2), lambda: torch.randn(2, 3, 9, 8)),
    "conv2d-groups": LayerCase(
        lambda: nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding=(1, 2)), lambda: torch.randn(2, 4, 9, 8)
    ),
    "conv3d": LayerCase(lambda: nn.Conv3d(2, 4, (3, 2, 1), bias=False), lambda: torch.randn(2, 2, 5, 4, 3)),
}


def as_reference(layer: nn.Module) -> nn.Module:
    """A float64 copy of the layer."""
    return copy.deepcopy(layer).double()
