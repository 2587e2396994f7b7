"""bitsandbytes layers that are quantized on the CPU, and comparisons of their packed weights."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

# Before 0.50 bitsandbytes' optimizers need a GPU, as do FP4 layers and sizes that are no multiple of the block.
BITSANDBYTES_NEEDS_GPU = Version(bnb.__version__) < Version("0.50") and not torch.cuda.is_available()
_REASON = "this part of bitsandbytes runs on a CPU from version 0.50 on"
needs_bitsandbytes_050 = pytest.mark.skipif(BITSANDBYTES_NEEDS_GPU, reason=_REASON)
# COLS is a multiple of the block size 64, as bitsandbytes misreads blocks that straddle rows on a CPU.
ROWS, COLS = 64, 128


def linear_4bit(
    quant_type: str = "nf4", double: bool = True, compute: torch.dtype | None = torch.float32, rows: int = ROWS
) -> nn.Module:
    """A 4-bit layer; `double` also quantizes its scales."""
    layer = bnb.nn.Linear4bit(COLS, rows, compute_dtype=compute, quant_type=quant_type, compress_statistics=double)
    return quantized_on_cpu(layer)


def quantized_on_cpu(layer: nn.Module) -> nn.Module:
    """Quantize a 4-bit layer; skips the test where bitsandbytes needs a GPU for that."""
    if BITSANDBYTES_NEEDS_GPU and (layer.weight.quant_type == "fp4" or layer.weight.numel() % layer.weight.blocksize):
        pytest.skip(_REASON)
    return layer.to("cpu")


def linear_8bit() -> nn.Module:
    """An 8-bit layer with one scale per row."""
    return bnb.nn.Linear8bitLt(COLS, ROWS, has_fp16_weights=False).to("cpu")


QUANTIZED = {
    "nf4": lambda: linear_4bit("nf4", double=False),
    "nf4-double": lambda: linear_4bit("nf4", double=True),
    "fp4": lambda: linear_4bit("fp4", double=False),
    "fp4-double": lambda: linear_4bit("fp4", double=True),
    "nf4-bf16": lambda: linear_4bit("nf4", compute=torch.bfloat16),
    "nf4-odd-rows": lambda: linear_4bit("nf4", rows=50),
    "nf4-compute-unset": lambda: linear_4bit("nf4", compute=None),
    "8bit": linear_8bit,
}


def dequantized(layer: nn.Module) -> Tensor:
    """The dequantized weight, computed without PEFT and without this project."""
    weight = layer.weight
    if isinstance(weight, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    scales = weight.SCB if weight.SCB is not None else layer.state.SCB
    return weight.data.float() * scales.float()[:, None] / 127


def _held(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, bnb.functional.QuantState):
        return {name: _held(entry) for name, entry in vars(value).items()}
    return value if not isinstance(value, nn.Module) else id(value)


def everything_held(layer: nn.Module) -> dict[str, Any]:
    """A copy of packed bytes, attributes of the parameter, and quantization state."""
    state = getattr(layer, "state", None)
    return {
        "bytes": layer.weight.data.clone(),
        "parameter": {name: _held(value) for name, value in vars(layer.weight).items()},
        "quant_state": _held(getattr(layer, "quant_state", None)),
        "state": {name: _held(getattr(state, name, None)) for name in ("CB", "SCB")},
    }


def assert_holds_the_same(got: Any, expected: Any, path: str = "layer") -> None:
    """Compare two results of `everything_held`, by value."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), path
        for name in expected:
            assert_holds_the_same(got[name], expected[name], f"{path}.{name}")
    elif isinstance(expected, Tensor):
        assert got.dtype == expected.dtype and torch.equal(got, expected), path
    else:
        assert got == expected, path
