"""Checkpoints on disk: their tensors, the names of these in the model, and which of them are tied."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .tensors import MemoryTensor, StoredTensor, read_pickled, read_safetensors

# What the tensors of a checkpoint are called in the model that it is loaded into, and which of them are tied.


_HEADS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


@dataclass
class ModelNames:
    """The parameters of a model, without their data.

    Attributes:
        modules: by full name; on the meta device.
        parameters: shapes by full parameter name.
        tied: for every parameter that has no storage of its own: the name of the parameter whose storage it uses.
        prefix: what a model with a head puts before the names of the model without.
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    parameters: dict[str, tuple[int, ...]]
    tied: dict[str, str] = field(default_factory=dict)
    prefix: str = ""

    @classmethod
    def of(cls, model: nn.Module) -> ModelNames:
        """The names of a model in memory or on the meta device; weights that are one object are tied."""
        shared: dict[int, list[str]] = {}
        parameters: dict[str, tuple[int, ...]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameters[name] = tuple(parameter.shape)
            shared.setdefault(id(parameter), []).append(name)
        # On the meta device a model is not tied yet, but says what will be, and which of the tied names leads.
        expanded = getattr(model, "all_tied_weights_keys", None) or {}
        tied = {name: owner for name, owner in expanded.items() if name in parameters and owner in parameters}
        for group in shared.values():
            owner = next((tied[name] for name in group if name in tied), group[0])
            tied.update(dict.fromkeys((name for name in group if name != owner), owner))
        modules = dict(model.named_modules(remove_duplicate=False))
        return cls(model, modules, parameters, tied, getattr(model, "base_model_prefix", "") or "")

    def find(self, name: str) -> str | None:
        """The parameter that an adapter calls `name`: it may have been trained with or without a head."""
        for candidate in (name, f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}.")):
            if candidate in self.parameters:
                return candidate
        return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises ValueError, naming the file, if it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} cannot be read: it is not a JSON object")
    return value


def names_of_folder(folder: Path) -> ModelNames | None:
    """The names in the transformers model of a folder with a ``config.json``; None where they cannot be known.

    The model is built on the meta device, by transformers' own classes only: code in the folder is not run.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    settings = read_json(path)
    if "model_type" not in settings:
        return None
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (ValueError, KeyError, ImportError, OSError):
        return None  # a model that this version of transformers does not know
    architecture = (settings.get("architectures") or [""])[0]
    kind = getattr(transformers, str(architecture), None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    try:
        with torch.device("meta"):
            model = kind(config) if known else transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, ImportError):
        return None
    except Exception as error:  # whatever a model's constructor makes of a damaged config
        raise ValueError(f"{path}: {architecture or 'the model'} cannot be built from it: {error}") from error
    return ModelNames.of(model)


def names_with_head(
    folder: Path, task_type: str | None, tensors: Mapping[str, torch.Size]
) -> tuple[ModelNames, dict[str, Any]] | None:
    """The names in a model with the head of a task, which the folder's own model lacks.

    Args:
        folder: holds a ``config.json`` of transformers.
        task_type: PEFT's, such as "SEQ_CLS".
        tensors: shapes of what an adapter saved in full, by parameter name; they tell the number of labels.

    Returns:
        The names and what ``config.json`` must say of such a model; None if no such model has these tensors.
    """
    import transformers

    auto = getattr(transformers, _HEADS.get(str(getattr(task_type, "value", task_type)), ""), None)
    if auto is None or not (folder / "config.json").is_file():
        return None
    for labels in sorted({shape[0] for shape in tensors.values() if shape}):
        try:
            config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False, num_labels=labels)
            with torch.device("meta"):
                names = ModelNames.of(auto.from_config(config))
        except (ValueError, KeyError, ImportError, OSError):
            return None
        if all(names.parameters.get(names.find(name) or "") == tuple(shape) for name, shape in tensors.items()):
            labeled = {"id2label": config.id2label, "label2id": config.label2id}
            return names, {"architectures": [type(names.model).__name__], **labeled}
    return None


def parameters_of_keys(keys: Iterable[str], names: ModelNames) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Which parameter each tensor of a checkpoint is loaded into.

    Args:
        keys: names of tensors as stored.
        names: of the model that loads them.

    Returns:
        ``(stored, converted)``: the stored name by parameter name; and for parameters that transformers computes from
        several tensors, or from one of another layout (fused experts), the names of those.
    """
    renamed = _rename_by_transformers(list(keys), names)
    stored: dict[str, str] = {}
    converted: dict[str, list[str]] = {}
    for key, (parameter, is_converted) in renamed.items():
        found = names.find(parameter) or parameter
        if is_converted:
            converted.setdefault(found, []).append(key)
        else:
            stored[found] = key
    return stored, converted


def _rename_by_transformers(keys: list[str], names: ModelNames) -> dict[str, tuple[str, bool]]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(names.model)
    except (ImportError, AttributeError, TypeError):
        return {key: (key, False) for key in keys}  # no transformers model, or a version that renames elsewhere
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
    out = {}
    for key in keys:
        if key in names.parameters:
            out[key] = (key, False)
            continue
        name, pattern = rename_source_key(key, renamings, converters, names.prefix, _Known(names.parameters))
        out[key] = (name, pattern is not None)
    return out


class _Known(dict[str, Any]):
    """What transformers asks for the presence of names."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        super().__init__(dict.fromkeys(names, True))


# Checkpoints: folders of weight files, single files, state dicts or models, all read tensor by tensor.


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
