"""Exports what a SpIEL adapter changes in a checkpoint: as sparse patches for vLLM, or as dense differences.

A sparse patch has the form in which vLLM's sparse weight transfer takes updates: the name and the full shape of a
tensor in the checkpoint, flat int32 positions, and the *new values* there, in the checkpoint's dtype. Positions and
values are contiguous, because senders pass their memory on as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files.adapter_file import AdapterFile, StoredDelta, parameter_of_key
from ..files.checkpoint import Base, Checkpoint, open_base
from ..files.folder import refuse_inputs, whole_folder
from .result import Conversion, Progress, open_adapter, tracked

SPARSE_PATCH = "sparse-patch"
FILE_NAME = "sparse_patch.safetensors"
_SHAPES = "full_shapes"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DENSE_DIFF = "dense-diff"
NAME = "diff"


@dataclass(frozen=True)
class Change:
    """One changed tensor.

    Attributes:
        name: of the tensor in the base's files.
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
    """Compute every tensor of a checkpoint that an adapter changes, one at a time.

    Args:
        adapter: the adapter.
        base: its base model, with values.
        where: names the adapter in messages.
        progress: called after each tensor.

    Raises:
        ValueError: the base lacks a tensor that the adapter changes, or has it in another shape; or it ties the tensor
            to one that the adapter does not change.
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
    """Tensors saved in full, and rows of embeddings with their numbers; by the base's parameter that holds them."""
    full: dict[str, Tensor] = {}
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    for key, tensor in adapter.others.items():
        found = adapter.token_rows(key, where)
        if found is not None:
            name, numbers = found
            rows[_holder(base, name, where)] = (numbers, tensor)
            continue
        name = parameter_of_key(key)
        stored = base.get(base.parameter(name, where))
        if name == key or stored is None or not stored.repeats(tensor):  # PEFT saves whole embeddings beside deltas
            full[_holder(base, name, where)] = tensor
    return full, rows


def _holder(base: Checkpoint, name: str, where: str) -> str:
    """The parameter that holds the tensor of a parameter: itself, or the one that it is tied to."""
    parameter = base.parameter(name, where)
    return base.owner(parameter) or parameter


def _refuse_tied(names: set[str], base: Checkpoint, where: str) -> None:
    """Refuse changes of a tensor that the base uses for several parameters."""
    for name in sorted(names):
        tied = [other for other in base.tie_group(name) if other != name]
        if tied:
            raise ValueError(
                f"{where}: tensor {name!r} shares its place in the checkpoint with {tied[0]!r}, which the adapter "
                "leaves alone; a change would reach both. Train with ensure_weight_tying=True, or merge it in memory"
            )


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


@dataclass(frozen=True)
class SparsePatch:
    """Replacement values of one checkpoint tensor; the fields are those of vLLM's ``SparseWeightPatch``.

    Attributes:
        name: of the tensor in the checkpoint.
        indices: ``[c]`` int32, sorted unique flat positions.
        values: ``[c]`` in the checkpoint's dtype.
        full_shape: of the checkpoint's tensor.
    """

    name: str
    indices: Tensor
    values: Tensor
    full_shape: tuple[int, ...]


def sparse_patches(
    adapter: str | os.PathLike[str] | AdapterFile,
    base: Base,
    *,
    progress: Progress | None = None,
) -> Iterator[SparsePatch]:
    """The patches of an adapter, tensor by tensor, ready to be sent.

    Args:
        adapter: a SpIEL adapter, or its folder.
        base: the checkpoint the server has loaded (see `open_base`); its values are needed.

    Raises:
        ValueError: the base does not fit, a tensor is too large for int32 positions, or a result is not finite.
    """
    source, where = open_adapter(adapter)
    for change in changes(source, open_base(base), where, progress):
        yield _patch(change, where)


def _patch(change: Change, where: str) -> SparsePatch:
    if change.positions.numel() and int(change.positions[-1]) >= 2**31:
        raise ValueError(
            f"{where}: tensor {change.name!r} has {change.original.numel()} entries; positions of 2**31 and more do "
            "not fit the patch's int32. Merge the adapter into the checkpoint instead"
        )
    if change.original.dtype not in _DTYPES:
        raise ValueError(f"{where}: tensor {change.name!r} has dtype {change.original.dtype} in the base")
    # vLLM marks entries that stay as they are with NaN.
    if not bool(torch.isfinite(change.values).all()):
        raise ValueError(f"{where}: tensor {change.name!r} gets values that are not finite in {change.original.dtype}")
    indices = change.positions.to(torch.int32).contiguous()
    return SparsePatch(change.name, indices, change.values.contiguous(), tuple(change.original.shape))


def export_sparse_patch(
    adapter: str | os.PathLike[str] | AdapterFile,
    out: str | os.PathLike[str],
    base: Base,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write an adapter's patches to a folder; `read_sparse_patches` reads them.

    ``sparse_patch.safetensors`` holds ``<name>.indices`` and ``<name>.values`` of every changed tensor, and the full
    shapes as JSON in its metadata.

    Args:
        adapter, base: see `sparse_patches`.
        out: folder to write.
        overwrite: replace what is at `out`.
    """
    refuse_inputs(out, {"adapter": adapter, "base": base}, "out")
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for patch in sparse_patches(adapter, base, progress=progress):
        stored[f"{patch.name}.indices"] = patch.indices
        stored[f"{patch.name}.values"] = patch.values
        shapes[patch.name] = list(patch.full_shape)
    if not shapes:
        raise ValueError(f"{adapter} changes nothing, so there is no patch to write")
    count = sum(tensor.numel() for key, tensor in stored.items() if key.endswith(".values"))
    with whole_folder(out, overwrite) as work:
        save_file(stored, work / FILE_NAME, metadata={"format": "pt", _SHAPES: json.dumps(shapes)})
    return Conversion(SPARSE_PATCH, count, sorted(shapes))


def read_sparse_patches(source: str | os.PathLike[str]) -> Iterator[SparsePatch]:
    """Read patches from a folder or file that `export_sparse_patch` wrote.

    Raises:
        FileNotFoundError, ValueError: the file is missing or damaged.
    """
    path = Path(source)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as tensors:
            shapes = json.loads((tensors.metadata() or {})[_SHAPES])
            for name, shape in shapes.items():
                indices, values = tensors.get_tensor(f"{name}.indices"), tensors.get_tensor(f"{name}.values")
                yield SparsePatch(name, indices, values, tuple(shape))
    except (SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as a sparse patch: {error}") from error


def export_dense_diff(
    adapter: str | os.PathLike[str] | AdapterFile,
    out: str | os.PathLike[str],
    base: Base,
    *,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write the difference that an adapter makes to each tensor it changes, in full shape, under the base's names.

    The differences are float32 (float64 for a float64 base), exact for deltas, and zero at entries without a change.
    Large results are split into shards with an index, as checkpoints are; no more than a shard is held in memory.

    Args:
        adapter: a SpIEL adapter, or its folder.
        out: folder to write ``diff.safetensors`` (or shards) to.
        base: the base model with its values (see `open_base`).
        max_shard_bytes: largest size of a file in bytes; a single tensor may be larger.
        overwrite: replace what is at `out`.

    Raises:
        ValueError: the base does not fit the adapter.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    refuse_inputs(out, {"adapter": adapter, "base": base}, "out")
    source, where = open_adapter(adapter)
    result = Conversion(DENSE_DIFF, 0, [])
    with whole_folder(out, overwrite) as work:
        writer = _Shards(work, max_shard_bytes)
        for change in changes(source, open_base(base), where, progress):
            writer.add(change.name, _dense(change))
            result.modules.append(change.name)
            result.num_deltas += change.positions.numel()
        if not result.modules:
            raise ValueError(f"{where} changes nothing, so there is no difference to write")
        writer.close()
    return result


def _dense(change: Change) -> Tensor:
    dense = torch.zeros(change.original.numel(), dtype=change.differences.dtype)
    dense[change.positions] = change.differences
    return dense.view(change.original.shape)


class _Shards:
    """Writes tensors to shards. The files get their names at the end, when the number of shards is known."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.waiting: dict[str, Tensor] = {}
        self.bytes = self.total = 0
        self.written: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if self.waiting and self.bytes + tensor.nbytes > self.max_bytes:
            self._write()
        self.waiting[name] = tensor
        self.bytes += tensor.nbytes
        self.total += tensor.nbytes

    def _write(self) -> None:
        save_file(self.waiting, self._part(len(self.written)), metadata={"format": "pt"})
        self.written.append(list(self.waiting))
        self.waiting, self.bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}"

    def close(self) -> None:
        self._write()
        count = len(self.written)
        if count == 1:
            self._part(0).rename(self.folder / f"{NAME}.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self.written):
            file = f"{NAME}-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True)
        (self.folder / f"{NAME}.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
