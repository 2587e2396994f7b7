"""Converts adapters of other PEFT methods into SpIEL adapters: Super-Tuning, and the published SpIEL code ("SFT").

The adapters are read as plain tensors and a plain dict; no code of those methods is needed or run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import json_object
from ..files.adapter_file import PREFIX, StoredDelta, read_tensors
from ..files.checkpoint import Base, Checkpoint, open_base
from .result import Conversion, Progress, finish, make_delta, tracked

_COMMON_FIELDS = ("base_model_name_or_path", "revision", "task_type", "auto_mapping")
# Embeddings that PEFT saves with an adapter that targets one of them.
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")
# Between a module and the name of a tensor in the keys of each method.
_SFT_MARKER = "sft_delta."
_SUPERTUNING_MARKER = "supertuning_"
# Criteria and fields of the published SpIEL code's config, and their names in `SpIELConfig`.
_GROWTH = {"rigl": "accumulated_gradient", "sm3": "momentum"}
_FIELDS = {
    "reselection_steps": "regrow_every",
    "selection_accumulation_steps": "accumulation_steps",
    "initial_reselection_rate": "initial_regrow_rate",
}
# Fields of that config without a counterpart in `SpIELConfig`.
_ONLY_THERE = ("dropout", "l2_reg")


@dataclass
class PeftSource:
    """An adapter folder of some PEFT method.

    Attributes:
        folder: the adapter's folder.
        path: the file of its tensors.
        config: the content of ``adapter_config.json``.
        tensors: all tensors, by key without PEFT's prefix.
    """

    folder: Path
    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def modules(self, marker: str, names: Collection[str]) -> dict[str, dict[str, Tensor]]:
        """The method's own tensors, by module and name.

        Their keys are ``<module>.<marker><name>``; the name of an adapter may stand before or after the last part.

        Raises:
            ValueError: a tensor of the method has another name, or two adapters are in one file.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            module, dot, rest = key.partition(f".{marker}")
            if not dot:
                continue
            parts = [part for part in rest.split(".") if part in names]
            if len(parts) != 1 or rest.count(".") > 1:
                raise ValueError(f"{self.path}: tensor {key!r} is not one that this converter can turn into deltas")
            if parts[0] in found.setdefault(module, {}):
                raise ValueError(f"{self.path}: tensor {key!r}: the module {module!r} has two of them")
            found[module][parts[0]] = tensor
        return found

    def others(self, marker: str) -> dict[str, Tensor]:
        """All other tensors: modules saved in full. Raises ValueError if the converted adapter would not load one."""
        others = {key: tensor for key, tensor in self.tensors.items() if f".{marker}" not in key}
        saved = self._modules_to_save()
        for key in others:
            module = key.rpartition(".")[0].removesuffix(".base_layer")
            known = any(f".{name}." in f".{key}" for name in saved)
            if not known and module.rpartition(".")[2] not in _EMBEDDING_NAMES:
                raise ValueError(
                    f"{self.path}: tensor {key!r} belongs to no module of modules_to_save ({saved}), so it would not "
                    "be loaded with the converted adapter"
                )
        return others

    def fields(self) -> dict[str, Any]:
        """The config fields that all PEFT methods share, for a `SpIELConfig`."""
        fields = {name: self.config.get(name) for name in _COMMON_FIELDS}
        if self._modules_to_save():
            fields["modules_to_save"] = self._modules_to_save()
        return fields

    def _modules_to_save(self) -> list[str]:
        names = self.config.get("modules_to_save") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{self.folder / 'adapter_config.json'}: modules_to_save must list names, got {names!r}")
        return names

    def delta(self, module: str, positions: Tensor, values: Tensor, base: Checkpoint | None) -> StoredDelta:
        """The delta of one module, from flat row-major positions ``[k]`` and their values ``[k]``."""
        numel = None
        if base is not None:
            shape = base.shape(f"{module}.weight", str(self.path))
            numel = math.prod(shape)
        return make_delta(positions, values, numel, str(self.path), module)


def read_peft_config(folder: Path) -> dict[str, Any]:
    """The content of ``adapter_config.json``. Raises FileNotFoundError or ValueError, naming the file."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} is not an adapter folder")
    return json_object(path)


def read_peft_source(folder: str | os.PathLike[str], peft_type: str) -> PeftSource:
    """Read the adapter of another method.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``, never unpickling code).
        peft_type: the method that the adapter must be of.

    Raises:
        FileNotFoundError, ValueError: the message names the file at fault.
    """
    folder = Path(folder)
    config = read_peft_config(folder)
    if config.get("peft_type") != peft_type:
        raise ValueError(
            f"{folder / 'adapter_config.json'}: peft_type is {config.get('peft_type')!r}, not {peft_type!r}"
        )
    path, tensors = read_tensors(folder)
    if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path}: an adapter file must hold tensors only")
    return PeftSource(folder, path, config, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()})


def need(entries: dict[str, Tensor], names: Collection[str], module: str, path: Path) -> None:
    """Raise ValueError unless a module has all of these tensors."""
    missing = sorted(set(names) - set(entries))
    if missing:
        raise ValueError(f"{path}: tensor {missing[0]!r} of module {module!r} is missing")


def convert_sft_fork(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: Base | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Turn an adapter of the published SpIEL code (a fork of PEFT, peft_type "SFT") into a SpIEL adapter folder.

    Its files hold ``<module>.sft_delta.indices``, flat row-major positions (int32 or int64), and ``.values``, their
    deltas. The positions are no longer sorted after they have moved once.

    Args:
        source: the adapter folder.
        out: folder to write.
        base: the base model (see `open_base`), to check names and positions against; optional.
        overwrite: replace what is at `out`.

    Raises:
        FileNotFoundError, ValueError: the file or tensor at fault is named, and nothing is written.
    """
    adapter = read_peft_source(source, "SFT")
    tensors = None if base is None else open_base(base)
    deltas: dict[str, StoredDelta] = {}
    modules = adapter.modules(_SFT_MARKER, ("values", "indices"))
    for module, entries in tracked(modules, progress):
        need(entries, ("values", "indices"), module, adapter.path)
        deltas[module] = adapter.delta(module, entries["indices"], entries["values"], tensors)
    result = Conversion("SFT", 0, [])
    fields = {**adapter.fields(), **_cycle(adapter, result)}
    return finish(result, deltas, adapter.others(_SFT_MARKER), fields, out, str(adapter.path), overwrite)


def _cycle(adapter: PeftSource, result: Conversion) -> dict[str, Any]:
    """The config fields of the cycle; they count if the adapter is trained further."""
    config = adapter.config
    fields = {ours: config[theirs] for theirs, ours in _FIELDS.items() if config.get(theirs) is not None}
    algorithm = config.get("selection_algorithm")
    if algorithm in _GROWTH:
        fields["growth"] = _GROWTH[algorithm]
    elif algorithm is not None:
        result.notes.append(f"selection_algorithm={algorithm!r} has no counterpart: the default growth is set")
    if config.get("dtype") in ("float32", "float16", "bfloat16"):
        fields["delta_dtype"] = config["dtype"]
    for name in _ONLY_THERE:
        if config.get(name):
            result.notes.append(f"{name}={config[name]} acts in training only and has no counterpart: left out")
    return fields


def convert_supertuning(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: Base | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Turn a Super-Tuning adapter into a SpIEL adapter folder.

    Its files hold ``<module>.supertuning_values`` and ``.supertuning_indices``, flat row-major positions in order of
    magnitude. Without indices (``save_precomputed_indices=False``) the positions are those of the base weight's
    largest or smallest entries, in that order.

    Args:
        source: the adapter folder.
        out: folder to write.
        base: the base model (see `open_base`), to check names and positions against; its values are needed if the
            adapter was saved without indices.
        overwrite: replace what is at `out`.

    Raises:
        FileNotFoundError, ValueError: the file or tensor at fault is named, and nothing is written. A Supra adapter,
            which adds a low-rank matrix, is refused.
    """
    adapter = read_peft_source(source, "SUPERTUNING")
    if adapter.config.get("r") is not None:
        raise ValueError(
            f"{adapter.folder / 'adapter_config.json'}: r={adapter.config['r']} makes it a Supra adapter, which adds a "
            "low-rank matrix to every weight; that is not sparse, so it cannot be a SpIEL adapter"
        )
    tensors = None if base is None else open_base(base)
    deltas: dict[str, StoredDelta] = {}
    result = Conversion("SUPERTUNING", 0, [])
    modules = adapter.modules(_SUPERTUNING_MARKER, ("values", "indices"))
    for module, entries in tracked(modules, progress):
        need(entries, ("values",), module, adapter.path)
        if "indices" not in entries:
            entries["indices"] = _positions_of_magnitude(adapter, module, entries["values"], tensors)
        deltas[module] = adapter.delta(module, entries["indices"], entries["values"], tensors)
    if any(f"{name}.{_SUPERTUNING_MARKER}indices" not in adapter.tensors for name in modules):
        result.notes.append(
            "The adapter was saved without indices: they were found again by the magnitude of the base's weights, "
            "which is right if the base, and the dtype it was loaded in, are those of the training"
        )
    result.notes.append('growth="none": the positions stay fixed if it is trained on, as in Super-Tuning')
    fields = {**adapter.fields(), "growth": "none"}
    return finish(result, deltas, adapter.others(_SUPERTUNING_MARKER), fields, out, str(adapter.path), overwrite)


def _positions_of_magnitude(adapter: PeftSource, module: str, values: Tensor, base: Checkpoint | None) -> Tensor:
    if base is None or not base.has_values:
        raise ValueError(
            f"{adapter.path}: tensor '{module}.{_SUPERTUNING_MARKER}indices' is missing, as the adapter was saved with "
            "save_precomputed_indices=False; pass base= with the values of the model it was trained on"
        )
    scores = base.value(f"{module}.weight", str(adapter.path)).abs().flatten()
    if values.numel() > scores.numel():
        raise ValueError(f"{adapter.path}: module {module!r} has more values than its weight has entries")
    return torch.topk(scores, k=values.numel(), largest=bool(adapter.config.get("select_top", True))).indices
