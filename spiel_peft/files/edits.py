"""Edits of a checkpoint's parameters: how adapters change them, tied parameters and fused experts included."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spiel_kernels import adapted_entries

from .adapter_file import AdapterFile, StoredDelta, parameter_of_key
from .checkpoint import Checkpoint
from .tensors import StoredTensor


@dataclass
class Edit:
    """The changes to one parameter, in the order they apply.

    Attributes:
        replacement: a new value of the whole parameter.
        rows: ``[n]`` int64 row numbers and ``[n, width]`` new rows.
        deltas: pairs of indices ``[k]`` and values ``[k]`` that add up.
        source: the adapter and tensor that an error should name.
    """

    replacement: Tensor | None = None
    rows: tuple[Tensor, Tensor] | None = None
    deltas: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    source: str = ""

    def same_as(self, other: Edit) -> bool:
        """Whether both edits change a parameter in the same way, bit for bit."""
        mine, others = self._tensors(), other._tensors()
        return [name for name, _ in mine] == [name for name, _ in others] and all(
            a.dtype == b.dtype and torch.equal(a, b) for (_, a), (_, b) in zip(mine, others, strict=True)
        )

    def _tensors(self) -> list[tuple[str, Tensor]]:
        tensors = [("replacement", self.replacement)] if self.replacement is not None else []
        tensors += [("rows", tensor) for tensor in self.rows or ()]
        return tensors + [("delta", tensor) for delta in self.deltas for tensor in delta]

    def shape(self, stored: StoredTensor | None) -> tuple[int, ...]:
        return tuple(self.replacement.shape) if self.replacement is not None else stored.shape

    def check(self, stored: StoredTensor | None, shape: tuple[int, ...] | None = None) -> None:
        """Raise a ValueError if a row or an index lies outside of the parameter.

        Args:
            stored: the parameter in the base; None if no file holds it.
            shape: of the parameter, if it is not the shape of `stored`.
        """
        shape = shape or self.shape(stored)
        numel = torch.Size(shape).numel()
        where = "the adapter" if stored is None or self.replacement is not None else stored.where
        for indices, _ in self.deltas:
            if indices.numel() and int(indices.max()) >= numel:
                raise ValueError(
                    f"{self.source}: index {int(indices.max())} is outside of the weight of shape {shape} in {where}; "
                    "the adapter was trained on another base"
                )
        if self.rows is not None:
            ids, rows = self.rows
            fits = len(shape) == 2 and rows.shape[1] == shape[1] and int(ids.max()) < shape[0] and int(ids.min()) >= 0
            if not fits:
                raise ValueError(
                    f"{self.source}: rows {ids.tolist()[:4]} of width {rows.shape[-1]} do not fit the weight of shape "
                    f"{shape} in {where}; the adapter was trained on another base"
                )

    def apply(self, piece: Tensor, start: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Change the entries ``[start, start + n)`` of the flattened parameter.

        Args:
            piece: ``[n]`` those entries as stored.
            width: length of a row.
            dtype: the dtype for rows that were trained in full.

        Returns:
            ``(piece, positions, sums)``: the piece with new rows; the int64 positions ``[u]`` in it that deltas change;
            and the new values ``[u]`` there, not yet rounded.
        """
        stop = start + piece.numel()
        if self.rows is not None:
            piece = self._put_rows(piece.to(dtype, copy=True), start, stop, width)
        inside = [_between(indices, values, start, stop) for indices, values in self.deltas]
        if not inside:
            return piece, torch.empty(0, dtype=torch.int64), torch.empty(0)
        positions, sums = adapted_entries(piece, inside)
        return piece, positions, sums

    def _put_rows(self, piece: Tensor, start: int, stop: int, width: int) -> Tensor:
        for row, new in zip(self.rows[0].tolist(), self.rows[1], strict=True):
            low, high = max(row * width, start), min((row + 1) * width, stop)
            if low < high:
                piece[low - start : high - start] = new[low - row * width : high - row * width].to(piece.dtype)
        return piece


def _between(indices: Tensor, values: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    low, high = torch.searchsorted(indices, torch.tensor([start, stop], dtype=indices.dtype)).tolist()
    return indices[low:high].to(torch.int64) - start, values[low:high]


def read_edits(
    adapters: Sequence[tuple[str, AdapterFile]], weights: Sequence[float], base: Checkpoint
) -> dict[str, Edit]:
    """Collect the edits that adapters make, by parameter of the base.

    Args:
        adapters: each with the name that errors give it.
        weights: factor of each adapter's deltas.
        base: the checkpoint that is edited.

    Raises:
        ValueError: the base has no place for a tensor, two adapters replace one parameter, or an adapter that holds
            more than deltas has another weight than 1.
    """
    edits: dict[str, Edit] = {}
    for (where, adapter), weight in zip(adapters, weights, strict=True):
        weights_of = base.weights_of(adapter.deltas, where)
        for module, delta in adapter.deltas.items():
            source = f"{where}: delta of {module!r}"
            edit = edits.setdefault(_place(base, weights_of[module], source), Edit())
            edit.deltas.append((delta.indices, _weighted(delta, weight)))
            edit.source = source
        for key in adapter.others:
            if _add_other(edits, base, adapter, key, where) and weight != 1:
                raise ValueError(
                    f"{where} replaces a whole tensor ({key}), which cannot be weighted with {weight}; give it the "
                    "weight 1"
                )
    return edits


def _weighted(delta: StoredDelta, weight: float) -> Tensor:
    return delta.values if weight == 1 else delta.values.float() * weight


def _add_other(edits: dict[str, Edit], base: Checkpoint, adapter: AdapterFile, key: str, where: str) -> bool:
    """Add the edit that a tensor other than a delta makes. Returns False if the tensor only repeats the base's."""
    tensor, source = adapter.others[key], f"{where}: tensor {key!r}"
    rows = adapter.token_rows(key, where)
    if rows is not None:
        name, ids = rows
        edit = edits.setdefault(_place(base, name, source), Edit())
        if edit.rows is not None or tuple(ids.shape) != tuple(tensor.shape[:1]):
            raise ValueError(f"{source} does not fit: {tensor.shape[0]} rows for {ids.numel()} token indices")
        edit.rows, edit.source = (ids, tensor), source
        return True
    name = parameter_of_key(key)
    parameter = _place(base, name, source)
    stored = base.get(parameter)
    if name != key and stored is not None and stored.repeats(tensor):
        return False  # PEFT saves whole embeddings beside their deltas
    edit = edits.setdefault(parameter, Edit())
    if edit.replacement is not None and not torch.equal(edit.replacement, tensor):
        raise ValueError(f"{source}: another adapter replaces this tensor as well; merge them one after the other")
    edit.replacement, edit.source = tensor, source
    return True


def _place(base: Checkpoint, name: str, source: str) -> str:
    """The parameter that an adapter calls `name`. Raises ValueError, naming `source`, if there is none."""
    parameter = base.find(name)
    if parameter is None:
        raise ValueError(f"{source} has no place in {base.where}, which has no {name}; the adapter is for another base")
    return parameter


def settle_ties(edits: dict[str, Edit], base: Checkpoint) -> list[str]:
    """Join the edits of tied parameters that change alike, and find the parameters whose tie breaks.

    Args:
        edits: by parameter; changed in place.
        base: the checkpoint.

    Returns:
        The parameters that need a stored tensor of their own.
    """
    apart: list[str] = []
    for owner in {base.owner(name) for name in edits} - {None}:
        group = base.tie_group(owner)
        if len(group) == 1:
            continue
        _share_rows(edits, group)
        changed = [edits.get(name, Edit()) for name in group]
        if all(edit.same_as(changed[0]) for edit in changed):
            for name in group:
                edits.pop(name, None)
            edits[owner] = changed[0]
        else:
            apart += [name for name in group if name != owner]
    return apart


def _share_rows(edits: dict[str, Edit], group: Sequence[str]) -> None:
    """Give all tied embeddings the rows that were trained in one of them: PEFT trains such rows together."""
    with_rows = [name for name in group if name in edits and edits[name].rows is not None]
    if len(with_rows) != 1:
        return
    for name in group:
        edit = edits.setdefault(name, Edit(source=edits[with_rows[0]].source))
        edit.rows = edits[with_rows[0]].rows


def config_changes(edits: Mapping[str, Edit], apart: Sequence[str], base: Checkpoint) -> dict[str, Any]:
    """The fields of ``config.json`` that the merged weights change: untied embeddings, the number of tokens."""
    changes: dict[str, Any] = {}
    if apart:
        changes["tie_word_embeddings"] = False
    model = base.names.model if base.names is not None else None
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    for name, edit in edits.items():
        module = name.removesuffix(".weight")
        is_embedding = embedding is not None and base.names.modules.get(module) is embedding
        if is_embedding and edit.replacement is not None:
            changes["vocab_size"] = edit.replacement.shape[0]
    return changes


# Fused experts: transformers makes one parameter of many stored tensors when it loads them. These conversions move
# whole rows; they leave the last dimension alone, unless they are told to work on it.
_ROW_WISE = {"MergeModulelist", "Concatenate"}


@dataclass(frozen=True)
class FusedRows:
    """Where each row of a fused parameter is stored; a row is its last dimension.

    Attributes:
        keys: names of the stored tensors.
        key: int64 ``[rows]``: the number in `keys` of the tensor that holds a row.
        row: int64 ``[rows]``: the number of the row in that tensor.
        width: length of a row.
    """

    keys: list[str]
    key: Tensor
    row: Tensor
    width: int


def split_fused(edits: dict[str, Edit], base: Checkpoint) -> None:
    """Turn edits of fused parameters into edits of the stored tensors.

    Args:
        edits: by parameter; changed in place.
        base: the checkpoint; changed, so that it treats these stored tensors as parameters.

    Raises:
        ValueError: a parameter is not made of whole stored rows.
    """
    for parameter in [name for name in edits if name in base.converted]:
        edit = edits.pop(parameter)
        rows = _find_rows(parameter, edit.source, base)
        edit.check(None, tuple(base.names.parameters[parameter]))
        for number, key in enumerate(rows.keys):
            edits[key] = _part(edit, rows, number, base.tensors[key].shape)
            base.stored[key] = key


def _part(edit: Edit, rows: FusedRows, number: int, shape: tuple[int, ...]) -> Edit:
    part = Edit(source=edit.source)
    if edit.replacement is not None:
        mine = rows.key == number
        part.replacement = torch.empty(shape, dtype=edit.replacement.dtype)
        part.replacement.view(-1, rows.width)[rows.row[mine]] = edit.replacement.reshape(-1, rows.width)[mine]
    for indices, values in edit.deltas:
        positions = indices.to(torch.int64)
        row, column = positions // rows.width, positions % rows.width
        mine = rows.key[row] == number
        stored = rows.row[row[mine]] * rows.width + column[mine]
        order = stored.argsort()
        part.deltas.append((stored[order], values[mine][order]))
    return part


def _find_rows(parameter: str, source: str, base: Checkpoint) -> FusedRows:
    """Find the stored rows of a parameter: transformers converts tensors that hold the numbers of their rows."""
    keys = base.converted[parameter]
    refusal = ValueError(
        f"{source} cannot be merged into files: {base.where} stores {parameter} in another layout ({keys[0]}, ...). "
        "Load the model, use merge_and_unload() and save it."
    )
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, dot_natural_key

        transforms = get_model_conversion_mapping(base.names.model)
    except (ImportError, AttributeError, TypeError) as error:
        raise refusal from error
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    keys = sorted(keys, key=dot_natural_key)
    used = None
    for number, key in enumerate(keys):
        name = key
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        matches = ((t, t.rename_source_key(name)[1]) for t in transforms if t not in renamings)
        converter, pattern = next(((t, pattern) for t, pattern in matches if pattern is not None), (None, None))
        if converter is None:
            raise refusal
        used = used or copy.deepcopy(converter)
        probe = torch.arange(base.tensors[key].shape[0], dtype=torch.int64) + (number << 40)
        used.add_tensor(parameter, key, pattern, probe[:, None])
    last = len(base.names.parameters[parameter]) - 1
    row_wise = all(type(op).__name__ in _ROW_WISE and getattr(op, "dim", 0) in range(last) for op in used.operations)
    if not row_wise or any(len(base.tensors[key].shape) != 2 for key in keys):
        raise refusal
    converted = used.convert(parameter, model=base.names.model, config=base.names.model.config)
    if isinstance(converted, tuple):  # with errors, in transformers 5.0
        converted = converted[0]
    codes = next(iter(converted.values()))
    shape = tuple(base.names.parameters[parameter])
    if tuple(codes.shape) != (*shape[:-1], 1) or any(base.tensors[key].shape[-1] != shape[-1] for key in keys):
        raise refusal
    codes = codes.flatten()
    return FusedRows(keys, codes >> 40, codes & ((1 << 40) - 1), shape[-1])
