"""Full-precision weights as bitsandbytes would have them after quantizing: what a QLoRA-style run was trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spiel_kernels.quantized_layout import NestedScales, Packed4bit, dequantize_4bit, dequantize_8bit

from .tensors import StoredTensor
from .weights import Checkpoint


class DequantizedTensor(StoredTensor):
    """A matrix that is quantized and dequantized when it is read; the last one read is kept.

    Args:
        stored: the full-precision matrix.
        config: transformers' ``BitsAndBytesConfig``.
        dtype: in which the model was loaded, and quantized from.
    """

    def __init__(self, stored: StoredTensor, config: Any, dtype: torch.dtype) -> None:
        super().__init__(stored.shape, dtype, stored.where)
        self.stored = stored
        self.config = config
        self._held: Tensor | None = None

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        if self._held is None:
            weight = self.stored.read().view(self.shape).to(self.dtype)
            self._held = _round_trip(weight, self.config).to(self.dtype).flatten()
        piece = self._held[start:stop].clone()
        if stop is None or stop == self.numel:
            self._held = None
        return piece


def _round_trip(weight: Tensor, config: Any) -> Tensor:
    """What the quantized form of a matrix stands for."""
    from bitsandbytes import functional

    if config.load_in_8bit:
        packed, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return dequantize_8bit(packed, scales)
    packed, state = functional.quantize_4bit(
        weight, compress_statistics=config.bnb_4bit_use_double_quant, quant_type=config.bnb_4bit_quant_type
    )
    nested = None
    if state.nested:
        nested = NestedScales(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    shape = (weight.shape[0], weight.shape[1])
    return dequantize_4bit(
        Packed4bit(packed, state.absmax, shape, weight.dtype, state.quant_type, state.blocksize, nested)
    )


def check_quantization(config: Any, base: Checkpoint) -> None:
    """Raise unless `config` is a 4- or 8-bit ``BitsAndBytesConfig`` and the base's model is known.

    Raises:
        ValueError: as said. ImportError: bitsandbytes is not installed.
    """
    if not (getattr(config, "load_in_4bit", False) or getattr(config, "load_in_8bit", False)):
        raise ValueError(
            "quantization_config must be a transformers.BitsAndBytesConfig with load_in_4bit or load_in_8bit, as the "
            f"model was loaded with in training; got {type(config).__name__}"
        )
    if base.names is None:
        raise ValueError(
            f"{base.where} has no config.json of a model that transformers knows, so which layers were quantized "
            "cannot be told; leave quantization_config out"
        )
    import bitsandbytes  # noqa: F401


def quantized_parameters(base: Checkpoint, config: Any) -> set[str]:
    """The weights that transformers quantizes when it loads this model with this config.

    Raises:
        ValueError: one of them is stored transposed, so that its quantized form has other positions.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = base.names.model
    skipped = HfQuantizer.get_modules_to_not_convert(
        model, config.llm_int8_skip_modules, getattr(model, "_keep_in_fp32_modules", None)
    )
    parameters = set()
    for name, module in base.names.modules.items():
        if not should_convert_module(name, skipped):
            continue
        if isinstance(module, Conv1D):
            raise ValueError(
                f"{name} is a transposed layer (Conv1D), which bitsandbytes quantizes the other way round: positions "
                "in it mean something else; leave quantization_config out only if training was not quantized"
            )
        if type(module) is nn.Linear:
            parameters.add(f"{name}.weight")
    return parameters
