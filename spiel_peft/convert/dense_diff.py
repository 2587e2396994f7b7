"""A SpIEL adapter as dense differences: full-shape tensors to be added to a checkpoint's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files.adapter_file import AdapterFile, read_adapter
from ..files.atomic import whole_folder
from .base import Base, BaseTensors, open_base
from .changes import Change, changes
from .result import Conversion, Progress

DENSE_DIFF = "dense-diff"
NAME = "diff"


def export_dense_diff(
    adapter: str | os.PathLike[str] | AdapterFile,
    out: str | os.PathLike[str],
    base: Base | BaseTensors,
    *,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write what an adapter adds to each tensor of its base, in full shape, under the base's names.

    The differences are float32 (float64 for a float64 base), exact for deltas; what the adapter leaves alone is zero.
    Large results are split into shards with an index, as checkpoints are; memory is one shard.

    Args:
        adapter: a SpIEL adapter, or its folder.
        out: folder to write ``diff.safetensors`` (or shards) to.
        base: the base model with its values (see `open_base`).
        max_shard_bytes: upper bound of a file, unless a single tensor is larger.
        overwrite: replace what is at `out`.

    Raises:
        ValueError: the base does not fit the adapter.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    source = adapter if isinstance(adapter, AdapterFile) else read_adapter(adapter)
    where = "The adapter" if isinstance(adapter, AdapterFile) else str(Path(adapter))
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
    """Writes tensors to numbered files as soon as one is full, and names them when their number is known."""

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
