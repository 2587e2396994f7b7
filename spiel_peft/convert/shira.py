"""Converts SHiRA adapters of PEFT into SpIEL adapters, and SpIEL adapters into SHiRA adapters for plain PEFT.

SHiRA adapters hold ``<module>.shira_weight`` ``[k]`` and ``<module>.shira_indices`` ``[2, k]``: rows and columns in the
weight of a linear layer. A module's k is ``r * (in + out)`` with one r for the whole adapter, as with SpIEL's default
budget.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import torch
from peft import ShiraConfig
from safetensors.torch import save_file
from torch import Tensor

from ..files.adapter_file import PREFIX, AdapterFile, StoredDelta
from ..files.checkpoint import Base, Checkpoint, open_base
from ..files.folder import refuse_inputs, whole_folder
from ..weights.base_weight import LINEAR
from .from_peft import PeftSource, need, read_peft_source
from .result import Conversion, Progress, finish, open_adapter, tracked

PEFT_TYPE = "SHIRA"
_MARKER = "shira_"
_FILE = "adapter_model.safetensors"


def convert_shira(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: Base,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Turn a SHiRA adapter into a SpIEL adapter folder.

    Args:
        source: the adapter folder.
        out: folder to write.
        base: the base model (see `open_base`); shapes are enough, and needed to turn rows and columns into positions.
        overwrite: replace what is at `out`.

    Raises:
        FileNotFoundError, ValueError: the file or tensor at fault is named, and nothing is written.
    """
    adapter = read_peft_source(source, PEFT_TYPE)
    tensors = open_base(base)
    deltas: dict[str, StoredDelta] = {}
    modules = adapter.modules(_MARKER, ("weight", "indices"))
    for module, entries in tracked(modules, progress):
        need(entries, ("weight", "indices"), module, adapter.path)
        positions = _flat(adapter, module, entries["indices"], tensors)
        deltas[module] = adapter.delta(module, positions, entries["weight"], tensors)
    result = Conversion(PEFT_TYPE, 0, [])
    result.notes.append('growth="none": the positions stay fixed if it is trained on, as in SHiRA')
    fields = {**adapter.fields(), "growth": "none"}
    return finish(result, deltas, adapter.others(_MARKER), fields, out, str(adapter.path), overwrite)


def _flat(adapter: PeftSource, module: str, indices: Tensor, base: Checkpoint) -> Tensor:
    """``[2, k]`` rows and columns -> ``[k]`` flat positions."""
    what = f"{adapter.path}: tensor '{module}.{_MARKER}indices'"
    shape = base.shape(f"{module}.weight", str(adapter.path))
    if indices.dim() != 2 or indices.shape[0] != 2 or len(shape) != 2:
        raise ValueError(f"{what} has shape {tuple(indices.shape)} for a weight of shape {shape}; wanted is (2, k)")
    # PEFT on Windows saves the indices as floats.
    whole = indices.long()
    if indices.is_floating_point() and not torch.equal(whole.to(indices.dtype), indices):
        raise ValueError(f"{what} has positions that are no integers")
    rows, columns = whole
    inside = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
    if not bool(inside.all()):
        raise ValueError(f"{what} leads out of the weight's shape {shape}; is the base another model?")
    return rows * shape[1] + columns


def export_shira(
    adapter: str | os.PathLike[str] | AdapterFile,
    out: str | os.PathLike[str],
    base: Base,
    *,
    r: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write a SpIEL adapter as a stock SHiRA adapter, which plain PEFT loads without this package.

    SHiRA needs ``r * (in + out)`` entries in every module, as many as an adapter with SpIEL's budget `r` has. Modules
    with fewer are filled up with entries of value zero, which change nothing.

    Args:
        adapter: a SpIEL adapter, or its folder.
        out: folder to write.
        base: the base model (see `open_base`); shapes are enough.
        r: of the SHiRA adapter. None: the smallest r with room for the deltas of every module.
        overwrite: replace what is at `out`.

    Raises:
        ValueError: SHiRA cannot express the adapter: layers other than linear ones, trained biases or tokens, more
            entries than `r` allows, or a small weight that does not have as many as `r` demands.
    """
    refuse_inputs(out, {"adapter": adapter, "base": base}, "out")
    source, where = open_adapter(adapter)
    tensors = open_base(base)
    shapes = {module: _linear_shape(module, tensors, where) for module in source.deltas}
    if not shapes:
        raise ValueError(f"{where} holds no deltas")
    _check_others(source, where)
    rank = _rank(source.deltas, shapes, r, where)
    result = Conversion(PEFT_TYPE, 0, sorted(shapes), sorted(source.others))
    stored = {f"{PREFIX}{key}": tensor.contiguous() for key, tensor in source.others.items()}
    padded = 0
    for module, delta in tracked(source.deltas, progress):
        if delta.k and int(delta.indices.max()) >= math.prod(shapes[module]):
            raise ValueError(
                f"{where}: module {module!r} has positions up to {int(delta.indices.max())}, but a weight of shape "
                f"{shapes[module]} in {tensors.where}; is it another model's?"
            )
        full = pad_with_zeros(delta, rank * sum(shapes[module]), math.prod(shapes[module]))
        padded += full.k - delta.k
        result.num_deltas += full.k
        positions, columns = full.indices.long(), shapes[module][1]
        rows_and_columns = torch.stack([positions // columns, positions % columns])
        stored[f"{PREFIX}{module}.{_MARKER}indices"] = rows_and_columns.to(torch.int32)
        stored[f"{PREFIX}{module}.{_MARKER}weight"] = full.values.contiguous()
    if padded:
        result.notes.append(f"{padded} entries of value zero were added, to have r * (in + out) of them with r={rank}")
    with whole_folder(out, overwrite) as work:
        _config(source, rank).save_pretrained(str(work), auto_mapping_dict=source.config.auto_mapping)
        save_file(stored, work / _FILE, metadata={"format": "pt"})
    return result


def pad_with_zeros(delta: StoredDelta, k: int, numel: int) -> StoredDelta:
    """Add entries of value zero at the lowest free positions.

    Args:
        delta: has at most `k` entries.
        k: number of entries of the result, at most `numel`.
        numel: size of the weight.
    """
    missing = k - delta.k
    if not missing:
        return delta
    # Among the first k positions at most delta.k are taken, so at least `missing` of them are free.
    free = torch.ones(k, dtype=torch.bool)
    taken = delta.indices.long()
    free[taken[taken < k]] = False
    added = free.nonzero().flatten()[:missing]
    positions, order = torch.cat([taken, added]).sort()
    values = torch.cat([delta.values, delta.values.new_zeros(missing)])[order]
    return StoredDelta(positions.to(delta.indices.dtype), values)


def _linear_shape(module: str, base: Checkpoint, where: str) -> tuple[int, int]:
    if base.find(module) is not None:
        raise ValueError(
            f"{where}: {module!r} is a bare parameter, and SHiRA adapts linear layers only; leave it out of "
            "target_parameters, or merge the adapter into the checkpoint instead"
        )
    shape = base.shape(f"{module}.weight", where)
    info = base.info(module)
    if len(shape) != 2 or (info is not None and info.kind != LINEAR):
        kind = f"a layer of kind {info.kind!r}" if info is not None else f"a weight of shape {shape}"
        raise ValueError(
            f"{where}: module {module!r} is {kind}, and SHiRA adapts linear layers only; leave it out of the adapter's "
            "target_modules, or merge the adapter into the checkpoint instead"
        )
    return shape


def _check_others(source: AdapterFile, where: str) -> None:
    saved = source.config.modules_to_save or []
    for key in source.others:
        # PEFT itself saves an adapted embedding, under the same key for every method.
        copied = key.endswith(("lm_head.base_layer.weight", "embed_tokens.base_layer.weight", "embed_tokens.weight"))
        if not copied and not any(f".{name}." in f".{key}" for name in saved):
            raise ValueError(
                f"{where}: tensor {key!r} is no module saved in full; SHiRA adapters hold no trained biases or tokens"
            )


def _rank(deltas: Mapping[str, StoredDelta], shapes: Mapping[str, tuple[int, int]], r: int | None, where: str) -> int:
    """The r of the SHiRA adapter: the one asked for, or the smallest with room for the deltas of every module."""
    needed = {module: math.ceil(delta.k / sum(shapes[module])) for module, delta in deltas.items()}
    largest = max(needed, key=lambda module: needed[module])
    rank = max(1, needed[largest]) if r is None else r
    if rank < needed[largest]:
        raise ValueError(
            f"r={r} is too small: module {largest!r} has {deltas[largest].k} deltas in {where}, for which SHiRA needs "
            f"r={needed[largest]}"
        )
    for module, shape in shapes.items():
        if rank * sum(shape) > math.prod(shape):
            raise ValueError(
                f"{where}: SHiRA has one r for all modules; r={rank}, which module {largest!r} needs, makes "
                f"{rank * sum(shape)} entries in module {module!r}, whose weight has {math.prod(shape)}. Train with "
                "the budget r and without rank_pattern or density_pattern, or leave that module out"
            )
    return rank


def _config(source: AdapterFile, rank: int) -> ShiraConfig:
    ours = source.config
    return ShiraConfig(
        r=rank,
        target_modules=sorted(source.deltas),
        modules_to_save=ours.modules_to_save,
        task_type=ours.task_type,
        base_model_name_or_path=ours.base_model_name_or_path,
        revision=ours.revision,
        inference_mode=True,
    )
