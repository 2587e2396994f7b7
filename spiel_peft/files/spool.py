"""Sparse deltas gathered piece by piece, in memory or in files, until an adapter is made of them."""

from __future__ import annotations

from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..card import facts_of_counts, update_card
from ..config import SpIELConfig
from ..tensor_checks import MARKER
from .adapter_file import PREFIX, StoredDelta
from .tensors import PIECE_BYTES, SafetensorsWriter, TensorSpec


class MemorySpool:
    """Deltas that are to stay in memory."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, module: str, indices: Tensor, values: Tensor) -> None:
        """Append ``[n]`` indices and their values to a module's delta."""
        self._pieces.setdefault(module, []).append((indices, values))

    def deltas(self) -> dict[str, StoredDelta]:
        return {
            module: StoredDelta(torch.cat([i for i, _ in pieces]), torch.cat([v for _, v in pieces]))
            for module, pieces in self._pieces.items()
        }


class DiskSpool:
    """Deltas on their way into an adapter folder: how many there will be is known only at the end.

    Args:
        folder: where a file per module and kind of tensor is kept meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, tuple[int, int, torch.dtype]] = {}  # number of its files, entries, dtype of indices

    def add(self, module: str, indices: Tensor, values: Tensor) -> None:
        """Append ``[n]`` indices and their float32 values to a module's delta."""
        number, count, _ = self._found.get(module, (len(self._found), 0, None))
        self._found[module] = (number, count + indices.numel(), indices.dtype)
        for name, tensor in (("indices", indices), ("values", values)):
            with open(self._path(number, name), "ab") as file:
                file.write(memoryview(tensor.contiguous().numpy()).cast("B"))

    def write(self, config: SpIELConfig, others: dict[str, Tensor], copies: dict[str, str], folder: Path) -> None:
        """Write an adapter folder of all that was added and of other tensors.

        Args:
            others: further tensors by key.
            copies: modules that have the same delta as another one, and that one.
        """
        found = {**self._found, **{module: self._found[owner] for module, owner in copies.items()}}
        specs = {PREFIX + key: TensorSpec.of(tensor.dtype, tuple(tensor.shape)) for key, tensor in others.items()}
        for module, (_, count, dtype) in found.items():
            specs[f"{PREFIX}{module}{MARKER}indices"] = TensorSpec.of(dtype, (count,))
            specs[f"{PREFIX}{module}{MARKER}values"] = TensorSpec.of(torch.float32, (count,))
        with SafetensorsWriter(folder / SAFETENSORS_WEIGHTS_NAME, specs) as writer:
            for key, tensor in others.items():
                writer.write(PREFIX + key, 0, tensor.flatten())
            for module, (number, _, _) in found.items():
                for name in ("indices", "values"):
                    self._copy(self._path(number, name), writer, f"{PREFIX}{module}{MARKER}{name}")
        config.save_pretrained(str(folder))
        update_card(folder, [facts_of_counts(config, {module: count for module, (_, count, _) in found.items()})])

    def _path(self, number: int, name: str) -> Path:
        return self.folder / f"{number}.{name}"

    @staticmethod
    def _copy(path: Path, writer: SafetensorsWriter, key: str) -> None:
        start = 0
        with open(path, "rb") as file:
            while data := file.read(PIECE_BYTES):
                writer.write_bytes(key, start, memoryview(data))
                start += len(data)
