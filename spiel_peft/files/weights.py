"""Checkpoints: folders of weight files, single files, state dicts or models, all read tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .names import ModelNames, names_of_folder, parameters_of_keys, read_json
from .tensors import MemoryTensor, StoredTensor, read_pickled, read_safetensors

Source = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_SUFFIX = ".index.json"


@dataclass
class Checkpoint:
    """The tensors of a model, wherever they are.

    Attributes:
        where: names it in messages.
        tensors: by the name they are stored under.
        files: which tensors each file of a folder holds, in the order of the files.
        names: the model that the tensors belong to, None where that is not known.
        stored: the stored name by parameter name; without `names` every tensor is its own parameter.
        converted: parameters that transformers computes from stored tensors of other layouts, with their names.
        tied: parameters that share the tensor of another one, and that one.
        copies: stored tensors of tied parameters that repeat what their owner's tensor holds, and those parameters.
    """

    where: str
    tensors: dict[str, StoredTensor]
    files: dict[str, list[str]] = field(default_factory=dict)
    names: ModelNames | None = None
    stored: dict[str, str] = field(default_factory=dict)
    converted: dict[str, list[str]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    def use_names(self, names: ModelNames | None, keep_ties: bool = True) -> None:
        """Say which model the tensors are of; what is tied in the model that was known before stays tied."""
        known = self.names if keep_ties and self.names is not None else names
        tied = known.tied if known is not None else {}
        self.names = names
        if names is None:
            self.stored, self.converted = {name: name for name in self.tensors}, {}
        else:
            self.stored, self.converted = parameters_of_keys(self.tensors, names)
        self.tied, self.copies = {}, {}
        for name, owner in tied.items():
            if name in self.stored and owner in self.stored:
                # As transformers does: stored twice, they are tied only if they are equal.
                if not same_contents(self.tensors[self.stored[name]], self.tensors[self.stored[owner]]):
                    continue
                self.copies[self.stored.pop(name)] = name
            self.tied[name] = owner

    def owner(self, parameter: str) -> str | None:
        """The parameter whose stored tensor `parameter` uses: itself, one that it is tied to, or none."""
        return next((name for name in self.tie_group(parameter) if name in self.stored), None)

    def tie_group(self, parameter: str) -> list[str]:
        """All parameters of the model that share one tensor with this one, itself included."""
        root = self.tied.get(parameter, parameter)
        return [root, *(name for name, owner in self.tied.items() if owner == root)]

    def get(self, parameter: str) -> StoredTensor | None:
        """The tensor that a parameter of the model is loaded from."""
        owner = self.owner(parameter)
        return None if owner is None else self.tensors[self.stored[owner]]


def same_contents(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors are equal in every entry; piece by piece."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(torch.equal(a.read(start, stop), b.read(start, stop)) for start, stop in a.pieces())


def open_checkpoint(source: Source, what: str) -> Checkpoint:
    """Open a checkpoint; no tensor is read.

    Args:
        source: a folder (safetensors or ``.bin``, sharded or not), one such file, a state dict, or a model.
        what: the caller's word for it in messages, such as "base".

    Raises:
        FileNotFoundError: nothing there, no weights in it, or a shard is missing.
        ValueError: a file is damaged, or the checkpoint is quantized.
    """
    if isinstance(source, nn.Module):
        tensors = {name: MemoryTensor(p, what) for name, p in source.state_dict().items() if isinstance(p, Tensor)}
        checkpoint = Checkpoint(what, dict(tensors))
        checkpoint.use_names(ModelNames.of(source))
        return checkpoint
    if isinstance(source, Mapping):
        return _plain(what, {name: MemoryTensor(tensor, what) for name, tensor in source.items()})
    path = Path(source)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{what}: {path} does not exist; give a local folder or file (snapshot_download of huggingface_hub does)"
        )
    return _plain(str(path), _read_file(path), {path.name: []})


def _plain(where: str, tensors: Mapping[str, StoredTensor], files: dict[str, list[str]] | None = None) -> Checkpoint:
    checkpoint = Checkpoint(where, dict(tensors), files or {})
    checkpoint.use_names(None)
    return checkpoint


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / "config.json").is_file():
        refuse_quantized(folder)
    tensors: dict[str, StoredTensor] = {}
    files: dict[str, list[str]] = {}
    for name, expected in _weight_files(folder).items():
        held = _read_file(folder / name)
        missing = sorted(set(expected or ()) - set(held))
        if missing:
            raise ValueError(f"{folder / name} lacks the tensor {missing[0]!r} that the index says is in it")
        files[name] = list(held)
        tensors.update(held)
    checkpoint = Checkpoint(str(folder), tensors, files)
    checkpoint.use_names(names_of_folder(folder))
    return checkpoint


def _weight_files(folder: Path) -> dict[str, list[str] | None]:
    """The files that hold a folder's weights, with the tensors that an index expects there."""
    for single in SINGLE_FILES:
        index = folder / (single + INDEX_SUFFIX)
        if index.is_file():
            shards: dict[str, list[str] | None] = {}
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index} has no weight_map")
            for tensor, name in weight_map.items():
                if Path(name).name != name:
                    raise ValueError(f"{index}: tensor {tensor!r} is in {name!r}, which is not a file of this folder")
                shards.setdefault(name, []).append(tensor)  # type: ignore[union-attr]
            return {name: shards[name] for name in sorted(shards)}
        if (folder / single).is_file():
            return {single: None}
    if (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} holds an adapter, not a model's weights: no model.safetensors in it")
    raise FileNotFoundError(f"{folder / SINGLE_FILES[0]} is missing, and so is an index of shards")


def _read_file(path: Path) -> Mapping[str, StoredTensor]:
    if path.suffix in (".bin", ".pt", ".pth") and path.is_file():
        return read_pickled(path)
    return read_safetensors(path)


def refuse_quantized(folder: Path) -> None:
    """Raise a ValueError if the weights of a folder are stored quantized."""
    quantized = read_json(folder / "config.json").get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
        raise ValueError(
            f"{folder} holds weights quantized with {method!r} (quantization_config in config.json), which cannot be "
            "changed entry by entry. Give the original full-precision checkpoint; to merge into the values that the "
            "quantized weights stand for, give it together with quantization_config."
        )
