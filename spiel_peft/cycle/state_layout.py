"""How optimizers store what they keep per entry of a parameter: plainly, in rows, or quantized in blocks.

A buffer is read as rows ``[rows, k]`` and written back as such. State that fits none of the layouts cannot follow a
change of indices; it is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_PLAIN_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.bool,
)
# Of the update as a whole, whatever their size.
_BITSANDBYTES_NORMS = ("gnorm_vec", "unorm_vec")
_BITSANDBYTES_BLOCK = 256


class Buffer(Protocol):
    """One per-entry buffer of an optimizer's state for a parameter."""

    name: str

    def read(self) -> Tensor:
        """Its entries ``[rows, k]``, dequantized; not to be written to."""

    def write(self, rows: Tensor, positive: Sequence[bool]) -> None:
        """Replace its entries.

        Args:
            rows: ``[rows, k]``.
            positive: per row, whether entries above zero must stay above zero when they are rounded.
        """


@dataclass(frozen=True)
class PlainBuffer:
    """A tensor ``[k]`` or ``[rows, k]`` of ordinary numbers."""

    name: str
    tensor: Tensor

    def read(self) -> Tensor:
        tensor = self.tensor.detach()
        return tensor if tensor.dim() == 2 else tensor[None]

    def write(self, rows: Tensor, positive: Sequence[bool]) -> None:
        self.tensor.detach().copy_(rows if self.tensor.dim() == 2 else rows[0])


@dataclass(frozen=True)
class BlockwiseBuffer:
    """bitsandbytes' 8-bit state: codes uint8 ``[k]`` or ``[rows, k]``, a scale per block of 256.

    Attributes:
        codes: may be paged memory, which is a CPU tensor to PyTorch.
        scales: ``[blocks]`` or ``[rows, blocks]``.
        code_values: what the codes stand for, ascending ``[256]``; shared by all parameters.
    """

    name: str
    codes: Tensor
    scales: Tensor
    code_values: Tensor

    def read(self) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        rows = [
            dequantize_blockwise(
                codes.to(scales.device), absmax=scales, code=self.code_values, blocksize=_BITSANDBYTES_BLOCK
            )
            for codes, scales in self._rows()
        ]
        return torch.stack(rows)

    def write(self, rows: Tensor, positive: Sequence[bool]) -> None:
        from bitsandbytes.functional import quantize_blockwise

        smallest = float(self.code_values[self.code_values > 0].min())
        for (codes, scales), row, above_zero in zip(self._rows(), rows, positive, strict=True):
            if above_zero:
                row = keep_above_zero(row, _BITSANDBYTES_BLOCK, smallest)
            packed, quantized = quantize_blockwise(row, code=self.code_values, blocksize=_BITSANDBYTES_BLOCK)
            codes.copy_(packed)
            scales.copy_(quantized.absmax)

    def _rows(self) -> list[tuple[Tensor, Tensor]]:
        if self.codes.dim() == 1:
            return [(self.codes, self.scales)]
        return list(zip(self.codes, self.scales, strict=True))


@dataclass(frozen=True)
class SelfQuantizingBuffer:
    """torchao's low-bit state: a tensor ``[k]`` that dequantizes itself, and quantizes what is copied into it."""

    name: str
    tensor: Any

    def read(self) -> Tensor:
        return self.tensor.dequantize()[None]

    def write(self, rows: Tensor, positive: Sequence[bool]) -> None:
        row = keep_above_zero(rows[0], self.tensor.block_size, self._smallest()) if positive[0] else rows[0]
        self.tensor.copy_(row)

    def _smallest(self) -> float:
        code_values = getattr(self.tensor, "qmap", None)
        if code_values is not None:
            return float(code_values[code_values > 0].min())
        codes = torch.finfo(self.tensor.codes.dtype)
        return codes.smallest_normal * codes.eps / codes.max


def keep_above_zero(row: Tensor, block_size: int, smallest: float) -> Tensor:
    """Raise positive entries ``[k]`` to the smallest that survives quantization in their block.

    A second moment that is rounded to zero would make the next update arbitrarily large.

    Args:
        row: floating.
        block_size: entries that share a scale, their largest magnitude.
        smallest: smallest positive code, as a share of the scale.
    """
    blocks = torch.nn.functional.pad(row, (0, -row.numel() % block_size)).view(-1, block_size)
    floor = (blocks.abs().amax(1, keepdim=True) * smallest).expand_as(blocks).reshape(-1)[: row.numel()]
    return torch.where(row > 0, torch.maximum(row, floor), row)


def buffers_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Buffer]:
    """Everything that the optimizer keeps per entry of `parameter`; looks at shapes and dtypes only.

    Raises:
        TypeError: it keeps something that cannot follow a change of indices; names the optimizer and the entry.
    """
    state = optimizer.state.get(parameter) or {}
    found: list[Buffer] = []
    for name, entry in state.items():
        if name == "step" or _belongs_to_another(optimizer, state, name):
            continue
        if isinstance(entry, Tensor):
            buffer = _layout(optimizer, state, name, entry, parameter)
            if buffer is not None:
                found.append(buffer)
                continue
        for tensor in _tensors_in(entry):
            if tensor.numel() > 1 and parameter.numel() > 1:
                raise TypeError(_unmappable(optimizer, name, tensor, parameter, entry))
    return found


def _belongs_to_another(optimizer: torch.optim.Optimizer, state: dict[str, Any], name: str) -> bool:
    """Whether an entry is part of a quantized buffer, or a norm that bitsandbytes keeps."""
    for prefix in ("qmap", "absmax"):
        if name.startswith(prefix):
            return _is_quantized(state, f"state{name.removeprefix(prefix)}")
    return name in _BITSANDBYTES_NORMS and hasattr(optimizer, "optimizer_name")


def _is_quantized(state: dict[str, Any], name: str) -> bool:
    number = name.removeprefix("state")
    codes = state.get(name)
    return isinstance(codes, Tensor) and codes.dtype == torch.uint8 and {f"qmap{number}", f"absmax{number}"} <= {*state}


def _layout(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], name: str, tensor: Tensor, parameter: Tensor
) -> Buffer | None:
    # The two averages of bitsandbytes' AdEMAMix share a tensor.
    two_rows = getattr(optimizer, "optimizer_name", None) == "ademamix" and name == "state1"
    if tensor.shape != ((2, *parameter.shape) if two_rows else parameter.shape):
        return None
    if _is_quantized(state, name):
        number = name.removeprefix("state")
        scales = state[f"absmax{number}"]
        if two_rows and scales.device.type == "cuda" and parameter.numel() % _BITSANDBYTES_BLOCK:
            raise TypeError(
                f"{type(optimizer).__name__} keeps state {name!r} of {parameter.numel()} deltas on a GPU, where it "
                f"mixes up the scales of two blocks unless their number is a multiple of {_BITSANDBYTES_BLOCK}: set "
                "num_deltas to such multiples, or use its 32-bit version"
            )
        return BlockwiseBuffer(name, tensor, scales, state[f"qmap{number}"])
    if all(hasattr(tensor, part) for part in ("codes", "scale", "block_size")):
        return SelfQuantizingBuffer(name, tensor)
    return PlainBuffer(name, tensor) if tensor.dtype in _PLAIN_DTYPES else None


def _tensors_in(entry: Any) -> list[Tensor]:
    if isinstance(entry, Tensor):
        return [entry]
    nested = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, (list, tuple)) else ()
    return [tensor for value in nested for tensor in _tensors_in(value)]


def _unmappable(optimizer: torch.optim.Optimizer, name: str, tensor: Tensor, parameter: Tensor, entry: Any) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    container = "" if isinstance(entry, Tensor) else f"in a {type(entry).__name__}: "
    return (
        f"{type(optimizer).__name__} keeps state {name!r} ({container}{dtype}, shape {tuple(tensor.shape)}) for "
        f"{parameter.numel()} deltas. SpIEL cannot permute that with the indices; use another optimizer, or "
        "growth='none'"
    )
