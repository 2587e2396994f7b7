"""What SpIEL is measured against: W + scatter(delta) as an autograd expression, with all its dense copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spiel_peft import SpIELLayer


class DenseLinear(nn.Module):
    """The plain formula: y = x (W + scatter(indices, values))^T; a 4-bit W is dequantized in every pass."""

    def __init__(self, layer: SpIELLayer) -> None:
        super().__init__()
        self.base = layer.get_base_layer()
        (delta,) = layer.spiel_delta.values()
        self.register_buffer("indices", delta.indices.to(torch.int64))
        self.values = nn.Parameter(torch.zeros_like(delta.values, dtype=torch.float32))

    def _weight(self) -> Tensor:
        state = getattr(self.base.weight, "quant_state", None)
        if state is None:
            return self.base.weight
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.base.weight.data, state)

    def forward(self, x: Tensor) -> Tensor:
        weight = self._weight()
        values = self.values.to(weight.dtype)
        adapted = weight.flatten().scatter_add(0, self.indices, values).view_as(weight)
        return nn.functional.linear(x, adapted, self.base.bias)


def use_dense_formula(model: nn.Module) -> Any:
    """Replace every SpIEL layer of a model by the plain formula on the same positions, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SpIELLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, DenseLinear(layer))
    return model
