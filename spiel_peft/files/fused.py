"""Parameters that transformers makes of many stored tensors when it loads them: fused experts, taken apart again."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from .edits import Edit
from .weights import Checkpoint

# Conversions that move whole rows and leave the last dimension alone, unless they are told to work on it.
_ROW_WISE = {"MergeModulelist", "Concatenate"}


@dataclass(frozen=True)
class FusedRows:
    """Where the rows of a fused parameter, its last dimension being a row, are stored.

    Attributes:
        keys: the stored tensors.
        key: int64 ``[rows]``: which of them a row is in.
        row: int64 ``[rows]``: which row of it that is.
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
        base: the checkpoint; from then on it takes those stored tensors for parameters.

    Raises:
        ValueError: the stored layout is not one of rows put together.
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
    """Let transformers convert tensors that hold the numbers of their rows."""
    keys = base.converted[parameter]
    refusal = ValueError(
        f"{source} cannot be merged into files: {base.where} stores {parameter} in another layout ({keys[0]}, ...). "
        "Load the model, use merge_and_unload() and save it."
    )
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, apply_renamings, dot_natural_key

        transforms = get_model_conversion_mapping(base.names.model)
    except (ImportError, AttributeError, TypeError) as error:
        raise refusal from error
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    keys = sorted(keys, key=dot_natural_key)
    used = None
    for number, key in enumerate(keys):
        name = apply_renamings(key, renamings)
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
    codes = next(iter(converted.values()))
    shape = tuple(base.names.parameters[parameter])
    if tuple(codes.shape) != (*shape[:-1], 1) or any(base.tensors[key].shape[-1] != shape[-1] for key in keys):
        raise refusal
    codes = codes.flatten()
    return FusedRows(keys, codes >> 40, codes & ((1 << 40) - 1), shape[-1])
