"""Sparse deltas on linear layers: nn.Linear, transformers' Conv1D, bitsandbytes and other quantized layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..base_weight import TRANSPOSED
from ..delta import SparseDelta
from ..weight_ops import LinearOp
from .base import SpIELLayer


class SpIELLinear(SpIELLayer):
    """A linear layer, plain, transposed or quantized, with sparse deltas."""

    known_forwards = (nn.Linear.forward, Conv1D.forward)

    def _knows_forward(self, base: nn.Module) -> bool:
        return self.quantization_backend is not None or super()._knows_forward(base)

    def _adapted_forward(self, deltas: list[SparseDelta], x: Tensor) -> Tensor:
        base = self.get_base_layer()
        if self.quantization_backend is not None:
            return self._quantized_forward(base, deltas, x)
        compute_dtype = autocast_dtype(x, base.weight.dtype)
        if x.dtype != compute_dtype and not torch.is_autocast_enabled(x.device.type):
            return type(base).forward(base, x)  # raises what the base layer raises for a foreign dtype
        op = LinearOp(transposed=self.info.kind == TRANSPOSED)
        return self._apply_adapted(op, deltas, x.to(compute_dtype), base.bias)

    def _quantized_forward(self, base: nn.Module, deltas: list[SparseDelta], x: Tensor) -> Tensor:
        if getattr(base, "compute_type_is_set", True) is False:
            # bitsandbytes settles the compute dtype at the first input it sees.
            base.set_compute_type(x)
            base.compute_type_is_set = True
        compute_dtype = getattr(base, "compute_dtype", None) or autocast_dtype(x, x.dtype)
        bias = getattr(base, "bias", None)
        return self._apply_adapted(LinearOp(False), deltas, x.to(compute_dtype), bias).to(x.dtype)


def autocast_dtype(x: Tensor, default: torch.dtype) -> torch.dtype:
    """The dtype in which torch would run a matrix product with x: autocast's, where it is on."""
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return default
