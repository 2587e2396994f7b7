"""What a SpIEL adapter makes of the tensors of a checkpoint, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files.adapter_file import AdapterFile, StoredDelta
from ..files.checkpoint import Checkpoint
from .result import Progress, tracked

_TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class Change:
    """One changed tensor.

    Attributes:
        name: in the base's checkpoint.
        original: the base's tensor, in its dtype.
        positions: ``[c]`` int64 sorted flat positions that the adapter sets.
        values: ``[c]`` their new values in the base's dtype: the sum in float32, rounded once.
        differences: ``[c]`` the exact differences, before rounding, float32 (float64 for a float64 base).
    """

    name: str
    original: Tensor
    positions: Tensor
    values: Tensor
    differences: Tensor


def changes(adapter: AdapterFile, base: Checkpoint, where: str, progress: Progress | None = None) -> Iterator[Change]:
    """Go through all tensors that an adapter changes.

    Args:
        adapter: what is applied.
        base: with values.
        where: names the adapter in messages.
        progress: called after each tensor.

    Raises:
        ValueError: the base lacks a tensor or it has another shape, or the adapter holds a tensor that has no place in
            a checkpoint of the base.
    """
    weights = base.weights_of(adapter.deltas, where)
    # Tied modules share one delta, which a file may hold under the names of both.
    deltas = {_holder(base, weights[module], where): delta for module, delta in adapter.deltas.items()}
    full, rows = _by_base_name(adapter, base, where)
    if not adapter.config.ensure_weight_tying:
        _refuse_tied({*deltas, *full}, base, where)
    for name, _ in tracked(dict.fromkeys(sorted({*deltas, *full, *rows})), progress):
        original = base.value(name, where)
        yield _change(base.stored[name], original, deltas.get(name), full.get(name), rows.get(name), where)


def _by_base_name(
    adapter: AdapterFile, base: Checkpoint, where: str
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Tensors saved in full, and rows of embeddings with their numbers."""
    full: dict[str, Tensor] = {}
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    for key, tensor in adapter.others.items():
        if key.endswith(_TOKENS):
            module = key.removesuffix(_TOKENS)
            rows[_holder(base, f"{module}.weight", where)] = (_token_numbers(adapter, module, where), tensor)
        else:
            full[_holder(base, key.replace(".base_layer.", "."), where)] = tensor
    return full, rows


def _holder(base: Checkpoint, name: str, where: str) -> str:
    """The parameter that holds the tensor of a parameter: itself, or the one that it is tied to."""
    parameter = base.parameter(name, where)
    return base.owner(parameter) or parameter


def _refuse_tied(names: set[str], base: Checkpoint, where: str) -> None:
    for name in sorted(names):
        tied = [other for other in base.tie_group(name) if other != name]
        if tied:
            raise ValueError(
                f"{where}: tensor {name!r} shares its place in the checkpoint with {tied[0]!r}, which the adapter "
                "leaves alone; a change would reach both. Train with ensure_weight_tying=True, or merge it in memory"
            )


def _token_numbers(adapter: AdapterFile, module: str, where: str) -> Tensor:
    chosen = adapter.config.trainable_token_indices
    if isinstance(chosen, Mapping):
        chosen = next((rows for name, rows in chosen.items() if f".{module}".endswith(f".{name}")), None)
    if not chosen:
        raise ValueError(f"{where}: trainable_token_indices of the config does not say which rows {module!r} holds")
    return torch.tensor(list(chosen), dtype=torch.int64)


def _change(
    name: str,
    original: Tensor,
    delta: StoredDelta | None,
    full: Tensor | None,
    rows: tuple[Tensor, Tensor] | None,
    where: str,
) -> Change:
    exact = torch.float64 if original.dtype == torch.float64 else torch.float32
    if full is None and rows is None:
        positions = delta.indices.long()
        _check_range(name, positions, original, where)
        before, differences = original.flatten()[positions].to(exact), delta.values.to(exact)
        return Change(name, original, positions, (before + differences).to(original.dtype), differences)
    wanted = original.to(exact, copy=True)
    if full is not None:
        if full.shape != original.shape:
            raise ValueError(
                f"{where}: tensor {name!r} has shape {tuple(full.shape)}, the base's {tuple(wanted.shape)}"
            )
        wanted.copy_(full)
    if rows is not None:
        numbers, values = rows
        if tuple(values.shape) != (numbers.numel(), *original.shape[1:]) or int(numbers.max()) >= len(original):
            raise ValueError(f"{where}: the trained rows of {name!r} do not fit its shape {tuple(original.shape)}")
        wanted[numbers] = values.to(exact)
    flat = wanted.flatten()
    if delta is not None:
        positions = delta.indices.long()
        _check_range(name, positions, original, where)
        flat[positions] += delta.values.to(exact)
    differences = flat - original.flatten().to(exact)
    positions = differences.nonzero().flatten()
    return Change(name, original, positions, flat[positions].to(original.dtype), differences[positions])


def _check_range(name: str, positions: Tensor, original: Tensor, where: str) -> None:
    if positions.numel() and int(positions[-1]) >= original.numel():
        raise ValueError(
            f"{where}: tensor {name!r} has positions up to {int(positions[-1])}, but a weight of shape "
            f"{tuple(original.shape)} in the base; is it another model's?"
        )
