"""Optimizer state of the deltas: finds its buffers, refuses those that cannot follow the indices, moves the others."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..delta import SparseDelta
from ..growth import get_growth_criterion
from .exchange import Moves
from .grown_seeds import GrownSeeds, Past, counter, rules_of, seeds_for, stays_positive
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
# What bitsandbytes keeps of the whole update, in vectors whose length may happen to be that of a parameter.
_BITSANDBYTES_NORMS = ("gnorm_vec", "unorm_vec")
_BITSANDBYTES_BLOCK = 256


class Buffer(Protocol):
    """One per-entry buffer of an optimizer's state for a parameter."""

    name: str

    @property
    def kind(self) -> tuple[Any, ...]:
        """Buffers of equal kind have entries that can be computed together."""

    def read(self) -> Tensor:
        """Its entries ``[rows, k]``, dequantized; not to be written to."""

    def write(self, rows: Sequence[Tensor], positive: Sequence[Tensor | bool]) -> None:
        """Replace its entries.

        Args:
            rows: ``[k]`` for each row.
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

    @property
    def kind(self) -> tuple[Any, ...]:
        return self.name, type(self), self.tensor.dtype, self.tensor.device, self.tensor.shape[:-1]

    def copies(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The tensor, and what is to be copied into it."""
        return self.tensor.detach(), torch.stack(list(rows)) if self.tensor.dim() == 2 else rows[0]

    def write(self, rows: Sequence[Tensor], positive: Sequence[Tensor | bool]) -> None:
        target, source = self.copies(rows)
        target.copy_(source)


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

    @property
    def kind(self) -> tuple[Any, ...]:
        return self.name, type(self), self.scales.dtype, self.scales.device, self.codes.shape[:-1]

    def write(self, rows: Sequence[Tensor], positive: Sequence[Tensor | bool]) -> None:
        from bitsandbytes.functional import quantize_blockwise

        smallest = self.code_values.where(self.code_values > 0, math.inf).amin()
        for (codes, scales), row, above_zero in zip(self._rows(), rows, positive, strict=True):
            row = keep_above_zero(row, _BITSANDBYTES_BLOCK, smallest, above_zero)
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

    @property
    def kind(self) -> tuple[Any, ...]:
        return self.name, type(self), self.tensor.dtype, self.tensor.device, ()

    def write(self, rows: Sequence[Tensor], positive: Sequence[Tensor | bool]) -> None:
        self.tensor.copy_(keep_above_zero(rows[0], self.tensor.block_size, self._smallest(), positive[0]))

    def _smallest(self) -> Tensor | float:
        code_values = getattr(self.tensor, "qmap", None)
        if code_values is not None:
            return code_values.where(code_values > 0, math.inf).amin()
        codes = torch.finfo(self.tensor.codes.dtype)
        return codes.smallest_normal * codes.eps / codes.max


def keep_above_zero(row: Tensor, block_size: int, smallest: Tensor | float, wanted: Tensor | bool = True) -> Tensor:
    """Raise positive entries ``[k]`` to the smallest that survives quantization in their block.

    A second moment that is rounded to zero would make the next update arbitrarily large.

    Args:
        row: floating.
        block_size: entries that share a scale, their largest magnitude.
        smallest: smallest positive code, as a share of the scale.
        wanted: False returns the entries as they are.
    """
    if wanted is False:
        return row
    blocks = torch.nn.functional.pad(row, (0, -row.numel() % block_size)).view(-1, block_size)
    floor = (blocks.abs().amax(1, keepdim=True) * smallest).expand_as(blocks).reshape(-1)[: row.numel()]
    raised = row > 0 if wanted is True else (row > 0) & wanted
    return torch.where(raised, torch.maximum(row, floor), row)


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


def counters(optimizers: list[torch.optim.Optimizer], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on a device that count the steps of these parameters, which `reseeded_states` has to know."""
    found = [
        counter(group, optimizer.state.get(parameter) or {})
        for optimizer, groups in _groups(optimizers)
        for parameter in parameters
        if (group := groups.get(id(parameter))) is not None
    ]
    return list({id(c): c for c in found if isinstance(c, Tensor) and c.device.type != "cpu"}.values())


def _groups(optimizers: list[torch.optim.Optimizer]) -> list[tuple[torch.optim.Optimizer, dict[int, dict[str, Any]]]]:
    """Each optimizer with the group of every parameter, by the parameter's id."""
    return [(o, {id(p): group for group in o.param_groups for p in group["params"]}) for o in optimizers]


def reseeded_states(
    optimizers: list[torch.optim.Optimizer],
    parameters: Sequence[Tensor],
    moves: Moves,
    seeds: GrownSeeds | None,
    known: Mapping[int, int],
) -> list[Callable[[], Any]]:
    """Permute and seed the optimizer state of some deltas whose indices a close changes.

    This is done in every optimizer that took part in the step. An optimizer around another one may share its state, as
    sharpness-aware minimization does: that is changed once, by the rules of the inner one, whose state it is. Buffers
    of one kind are computed together.

    Args:
        optimizers: the outermost first; they have just stepped `parameters`.
        parameters: the values ``[k]`` of each matrix of `moves`.
        moves: what the close does to their entries.
        seeds: window statistics of the grown positions; None without a window.
        known: the contents of `counters`, by the id of the tensor.

    Returns:
        The writes that are left to do. All results are computed; a write may be repeated.

    Raises:
        TypeError: see `buffers_of`.
    """
    groups = _groups(optimizers)
    kinds: dict[tuple[Any, ...], list[tuple[int, Buffer]]] = {}
    pasts: dict[tuple[Any, ...], tuple[torch.optim.Optimizer, Past]] = {}
    for number, parameter in enumerate(parameters):
        owners = {id(o.state.get(parameter)): (o, of_parameter.get(id(parameter))) for o, of_parameter in groups}
        for optimizer, group in owners.values():
            buffers = buffers_of(optimizer, parameter)
            if not buffers:
                continue
            past = Past.of(group, optimizer.state[parameter], seeds.steps if seeds is not None else 0, known)
            for buffer in buffers:
                kind = (id(optimizer), id(group), past.steps, past.corrects, *buffer.kind)
                kinds.setdefault(kind, []).append((number, buffer))
                pasts[kind] = optimizer, past
    writes: list[Callable[[], Any]] = []
    for kind, buffers in kinds.items():
        if len(buffers) == len(parameters):
            together = [([buffer for _, buffer in buffers], moves, seeds)]
        else:
            together = [([buffer], moves.single(n), seeds and seeds.single(moves, n)) for n, buffer in buffers]
        for some, their_moves, their_seeds in together:
            writes += _reseeded(some, *pasts[kind], their_moves, their_seeds)
    return writes


def _reseeded(
    buffers: list[Buffer], optimizer: torch.optim.Optimizer, past: Past, moves: Moves, seeds: GrownSeeds | None
) -> list[Callable[[], Any]]:
    """The writes to buffers of one kind, one for each matrix of `moves`."""
    before = [buffer.read() for buffer in buffers]  # [rows, k] each
    moves = moves.to(before[0].device)
    entries = moves.entries
    rules = rules_of(optimizer, past.group, buffers[0].name, before[0].shape[0])
    after, positive = [], []
    for number, rule in enumerate(rules):
        parts = [rows[number] for rows in before]
        row = entries.join(parts)
        after.append(entries.split(moves.apply(row, seeds_for(rule, row, moves, past, seeds))))
        positive.append([stays_positive(rule, part) for part in parts])
    by_buffer = zip(buffers, zip(*after, strict=True), zip(*positive, strict=True), strict=True)
    if all(isinstance(buffer, PlainBuffer) for buffer in buffers):
        return [partial(copy_all, *zip(*(buffer.copies(rows) for buffer, rows, _ in by_buffer), strict=True))]
    return [partial(buffer.write, rows, above_zero) for buffer, rows, above_zero in by_buffer]


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, on a GPU in a few launches."""
    torch._foreach_copy_(list(targets), list(sources))
    # Under a dispatch mode, such as a counter of operations, PyTorch's foreach operations do not count as writes, and
    # what is remembered of the old indices would be taken for that of the new ones.
    torch.autograd.graph.increment_version(list(targets))


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
