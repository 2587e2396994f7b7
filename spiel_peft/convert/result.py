"""The report of a conversion, and the steps that all conversions into SpIEL adapters share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from spiel_kernels import index_dtype

from ..adapter_format import check_indices_and_values
from ..files.adapter_file import AdapterFile, StoredDelta, config_of_deltas, read_adapter, write_adapter
from ..files.folder import refuse_inputs
from ..files.tensors import Progress

KEEP, DROP = "keep", "drop"
Item = TypeVar("Item")


@dataclass
class Conversion:
    """Report of a conversion.

    Attributes:
        kind: the format that was converted from or to.
        num_deltas: number of deltas in all modules.
        modules: names of the modules with deltas.
        others: names of the tensors kept in full (modules to save, biases).
        dropped: names of the tensors left out; none unless the caller asked for it.
        notes: sentences for the user.
    """

    kind: str
    num_deltas: int
    modules: list[str]
    others: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def open_adapter(adapter: str | os.PathLike[str] | AdapterFile) -> tuple[AdapterFile, str]:
    """A SpIEL adapter, which is read if its folder is given, and its name in messages."""
    if isinstance(adapter, AdapterFile):
        return adapter, "The adapter"
    return read_adapter(adapter), str(Path(adapter))


def tracked(items: Mapping[str, Item], progress: Progress | None) -> Iterator[tuple[str, Item]]:
    """Iterate over the items of a dict; `progress` is called when the caller is done with an item."""
    for done, (name, item) in enumerate(items.items(), 1):
        yield name, item
        if progress is not None:
            progress(done, len(items), name)


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise ValueError unless an argument is one of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")


def make_delta(positions: Tensor, values: Tensor, numel: int | None, where: str, what: str) -> StoredDelta:
    """Make a delta of entries in any order: sort them, and add up those at the same position.

    Args:
        positions: ``[k]`` integer flat row-major positions, in any order.
        values: ``[k]`` floating.
        numel: size of the weight; None if it is not known.
        where, what: the file and the tensor, for messages.

    Raises:
        ValueError: positions or values have a wrong shape, dtype or range; the message names file and tensor.
    """
    if positions.dim() != 1 or positions.shape != values.shape:
        raise ValueError(
            f"{where}: tensor {what!r} has positions of shape {tuple(positions.shape)} for values of shape "
            f"{tuple(values.shape)}"
        )
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise ValueError(f"{where}: tensor {what!r} has positions of dtype {positions.dtype}, not integers")
    unique, inverse = torch.unique(positions.long(), return_inverse=True)
    summed = values.new_zeros(unique.shape)
    if unique.numel() == positions.numel():
        summed[inverse] = values
    else:
        summed.index_add_(0, inverse, values)
    size = numel if numel is not None else (int(unique[-1]) + 1 if unique.numel() else 1)
    delta = StoredDelta(unique.to(index_dtype(size)), summed)
    problem = check_indices_and_values({"indices": delta.indices, "values": delta.values}, numel)
    if problem is not None:
        raise ValueError(f"{where}: tensor {what!r}: {problem[0]} {problem[1]}")
    return delta


def finish(
    result: Conversion,
    deltas: Mapping[str, StoredDelta],
    others: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    out: str | os.PathLike[str],
    where: str,
    overwrite: bool,
) -> Conversion:
    """Write the adapter of a conversion and complete its report.

    Args:
        result: the report; completed in place and returned.
        deltas: by module name; modules without entries are left out.
        others: tensors saved in full, by key.
        fields: of the `SpIELConfig`.
        out: folder to write.
        where: the source file, for messages.
        overwrite: replace what is at `out`.
    """
    refuse_inputs(out, {"source": where}, "out")
    filled = {name: delta for name, delta in deltas.items() if delta.k}
    if not filled:
        raise ValueError(f"{where} holds no sparse difference of a weight, so there is nothing to convert")
    empty = sorted(set(deltas) - set(filled))
    if empty:
        result.notes.append(f"{len(empty)} modules had no entries and are left out: {', '.join(empty[:3])} ...")
    try:
        config = config_of_deltas(filled, inference_mode=True, **fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: its settings make no valid SpIELConfig: {error}") from error
    write_adapter(AdapterFile(config, filled, dict(others)), Path(out), overwrite)
    result.num_deltas = sum(delta.k for delta in filled.values())
    result.modules = sorted(filled)
    result.others = sorted(others)
    return result
