"""Optimizer state of the deltas: finds its buffers, refuses those that cannot follow the indices, moves the others."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..delta import SparseDelta
from ..growth import get_growth_criterion
from .grown_seeds import GrownSeeds, Past, rules_of, seeds_for
from .steps import inner_optimizers

# A buffer holds numbers for each entry of a parameter: plainly, in rows, or quantized in blocks. It is read and written
# as rows ``[rows, k]``. State in any other layout cannot follow a change of indices and is refused by name.


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
# Norms of the whole update, whatever their size.
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


# At a close the state is permuted with the indices, and the entries of grown deltas are seeded (`grown_seeds`): stale
# state would push them anywhere, and a second moment of zero would make their first update arbitrarily large.


def permute(tensor: Tensor, source: Tensor, grown: Tensor | float) -> Tensor:
    """``[k]`` tensor after a close: slot j comes from slot source[j], or is ``grown[-1 - source[j]]``."""
    out = tensor.index_select(0, source.clamp(min=0))
    new = source < 0
    if not isinstance(grown, Tensor):
        return out.masked_fill_(new, grown)
    out[new] = grown.index_select(0, -1 - source[new]).to(out)
    return out


def reseeded_states(
    optimizers: list[torch.optim.Optimizer], parameter: Tensor, source: Tensor, seeds: GrownSeeds | None
) -> list[Callable[[], Any]]:
    """Bring what all optimizers that took part in a step keep for one delta's values in line with its new indices.

    An optimizer around another one may share its state, as sharpness-aware minimization does: that is changed once, by
    the rules of the inner one, whose state it is.

    Args:
        optimizers: the outermost first; they have just stepped `parameter`.
        parameter: the values ``[k]``.
        source: int64 ``[k]`` from `spiel_kernels.replace_positions`.
        seeds: window statistics of the grown positions, in the order `source` numbers them; None without a window.

    Returns:
        The writes that are left to do, one per buffer. All results are computed; a write may be repeated.

    Raises:
        TypeError: see `buffers_of`.
    """
    owners = {id(optimizer.state.get(parameter)): optimizer for optimizer in optimizers}
    return [write for optimizer in owners.values() for write in _reseeded_state(optimizer, parameter, source, seeds)]


def _reseeded_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, source: Tensor, seeds: GrownSeeds | None
) -> list[Callable[[], Any]]:
    buffers = buffers_of(optimizer, parameter)
    if not buffers:
        return []
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    past = Past.of(group, optimizer.state[parameter], seeds.steps if seeds is not None else 0)
    writes: list[Callable[[], Any]] = []
    for buffer in buffers:
        before = buffer.read()
        moves = source.to(before.device)
        rules = rules_of(optimizer, group, buffer.name, before)
        after = [
            permute(row, moves, seeds_for(rule, row, moves, past, seeds))
            for row, rule in zip(before, rules, strict=True)
        ]
        rows = torch.stack(after) if len(after) > 1 else after[0][None]
        writes.append(partial(buffer.write, rows, [rule.positive for rule in rules]))
    return writes


# Optimizers create their state in their first step. So most of it is checked at the first close, before the close
# changes anything.


_CHECKED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def check_optimizer(optimizer: torch.optim.Optimizer, deltas: list[SparseDelta]) -> None:
    """Refuse an optimizer whose state cannot follow a change of indices, as far as can be known before it steps.

    Called before every step; looks once at each optimizer.

    Raises:
        TypeError: names the optimizer and what it keeps; nothing was changed then.
    """
    if optimizer in _CHECKED:
        return
    moving = [delta for delta in deltas if get_growth_criterion(delta.run.config.growth).propose is not None]
    if not moving:
        return
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            f"{name} keeps state 'old_dirs', one history of all parameters together. SpIEL cannot permute that with "
            "the indices; use another optimizer, or growth='none'"
        )
    if inspect.unwrap(type(optimizer).step) is inspect.unwrap(torch.optim.Optimizer.step):
        raise TypeError(
            f"{name} has no step of its own: it updates parameters while the backward pass runs, and SpIEL's cycle "
            "acts at steps; use another optimizer, or growth='none'"
        )
    for delta in moving:
        buffers_of(optimizer, delta.values)
    _CHECKED.add(optimizer)


def check_state(optimizers: list[torch.optim.Optimizer], parameter: Tensor) -> None:
    """Refuse optimizers whose state for `parameter` cannot follow a change of indices.

    Args:
        optimizers: those that took part in a step.
        parameter: values of a delta that they hold.

    Raises:
        TypeError: names the optimizer and the state.
    """
    kept = [buffers_of(optimizer, parameter) for optimizer in optimizers]
    for optimizer in optimizers:
        _check_for_entries_elsewhere(optimizer, parameter)
    if not any(kept):
        for optimizer in optimizers:
            _check_for_hidden_state(optimizer, optimizers)


def _check_for_hidden_state(optimizer: torch.optim.Optimizer, took_part: list[torch.optim.Optimizer]) -> None:
    """Refuse an optimizer that keeps its state in other optimizers, for copies of the parameters."""
    inside = inner_optimizers(optimizer)
    if inside and not any(inner is other for _, inner in inside for other in took_part):
        name, inner = inside[0]
        raise TypeError(
            f"{type(optimizer).__name__} keeps its state in other optimizers ({name!r}: {type(inner).__name__}), "
            "where SpIEL cannot permute it with the indices; use another optimizer, or growth='none'"
        )


def _check_for_entries_elsewhere(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Refuse state under a name, such as a dict of tensors by parameter, beside the usual state by parameter."""
    for name, entry in optimizer.state.items():
        if isinstance(name, Tensor) or not isinstance(entry, dict):
            continue
        kept = next((value for key, value in entry.items() if key is parameter), None)
        if isinstance(kept, Tensor) and kept.numel() > 1:
            raise TypeError(
                f"{type(optimizer).__name__} keeps state {name!r} for all parameters together, with a tensor for each "
                "of them. SpIEL cannot permute that with the indices; use another optimizer, or growth='none'"
            )
