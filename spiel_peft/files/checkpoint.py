"""Checkpoints: where a model's tensors are, how they are read, and which tensor an adapter means by a name.

Merging, extraction, conversion and inspection all read checkpoints and resolve names here, so that they cannot
disagree about which weight a module means.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..checks import json_object
from ..weights.base_weight import BaseInfo
from .folder import file_within
from .model_names import ModelNames, names_of_folder, parameters_of_keys
from .tensors import MemoryTensor, StoredTensor, read_pickled, read_safetensors

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_SUFFIX = ".index.json"


@dataclass
class Checkpoint:
    """The tensors of one model, wherever they are stored.

    Attributes:
        where: names the checkpoint in messages.
        tensors: by the name that they are stored under; empty if only shapes are known.
        files: the names of the tensors in each file of a folder, in the order of the files.
        has_values: whether tensors can be read; False if only shapes are known.
        names: the model that the tensors belong to; None if it is not known.
        shapes: of every parameter, by its name in the model; of a quantized weight the dequantized shape.
        stored: the stored name by parameter name. Without `names` every tensor is a parameter of the same name.
        converted: for parameters that transformers computes from tensors of other layouts, the names of these.
        tied: for every parameter that uses the tensor of another one, the name of that one, its owner.
        copies: stored tensors that repeat the tensor of an owner, with the tied parameter that each belongs to.
    """

    where: str
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    has_values: bool = True
    names: ModelNames | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    converted: dict[str, list[str]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    def use_names(self, names: ModelNames | None, keep_ties: bool = True) -> None:
        """Set the model that the tensors belong to.

        Args:
            names: the model; None if it is not known.
            keep_ties: go on with the ties of the model that was set before, if there was one.
        """
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
                # transformers ties parameters that are both stored only if the two tensors are equal.
                if not same_contents(self.tensors[self.stored[name]], self.tensors[self.stored[owner]]):
                    continue
                self.copies[self.stored.pop(name)] = name
            self.tied[name] = owner
        self.shapes = dict(names.parameters) if names is not None else {}
        if names is not None:
            self.shapes.update({f"{module}.weight": info.weight_shape for module, info in names.infos.items()})
        for parameter, key in self.stored.items():
            # The files may hold more than the model has, such as the head of another class.
            self.shapes.setdefault(parameter, self.tensors[key].shape)

    # Names

    def find(self, name: str) -> str | None:
        """The parameter that an adapter calls `name`; None if there is none. Every lookup of a name goes through here.

        It is the parameter of the same name; else the one that differs by the head's prefix; else the only one that
        differs by a wrapper, which puts leading parts before all names of a model (``encoder.0.weight`` and
        ``bert.encoder.0.weight``).

        Raises:
            ValueError: several parameters differ from `name` by a wrapper.
        """
        if name in self.shapes:
            return name
        found = self.names.find(name) if self.names is not None else None
        if found is not None:
            return found
        candidates = [parameter for parameter in self.shapes if _differ_by_wrapper(parameter, name)]
        if len(candidates) > 1:
            raise ValueError(f"{self.where}: tensor {name!r} could be any of {sorted(candidates)[:3]}")
        return candidates[0] if candidates else None

    def parameter(self, name: str, wanted_by: str) -> str:
        """As `find`, but raises a ValueError if there is no such parameter. `wanted_by` names the adapter's file."""
        found = self.find(name)
        if found is None:
            raise ValueError(f"{wanted_by}: the base {self.where} has no tensor {name!r}; is it another model's?")
        return found

    def weight_of(self, module: str) -> str:
        """The parameter that the delta of a module belongs to.

        Args:
            module: name of a module; or of a bare parameter, which is then the result.

        Returns:
            ``<module>.weight`` as it stands if there is no such parameter.
        """
        weight = f"{module}.weight"
        for exact in (weight, module):
            if exact in self.shapes:
                return exact
        return self.find(module) or self.find(weight) or weight

    def weights_of(self, modules: Iterable[str], wanted_by: str) -> dict[str, str]:
        """`weight_of` by module, for all of one adapter. Raises ValueError if two of them mean the same parameter."""
        weights = {module: self.weight_of(module) for module in modules}
        meant: dict[str, str] = {}
        for module, parameter in weights.items():
            other = meant.setdefault(parameter, module)
            if other != module:
                raise ValueError(
                    f"{wanted_by}: the deltas of {other!r} and {module!r} both belong to tensor {parameter!r} of "
                    f"{self.where}"
                )
        return weights

    def shape(self, name: str, wanted_by: str) -> tuple[int, ...]:
        """Shape of a parameter. Raises ValueError as `parameter` does."""
        return self.shapes[self.parameter(name, wanted_by)]

    def info(self, module: str) -> BaseInfo | None:
        """What `inspect_base` says of a module; None if it cannot carry deltas or the model is not known."""
        weight = self.find(f"{module}.weight")
        return None if weight is None or self.names is None else self.names.infos.get(weight.removesuffix(".weight"))

    def tensors_of(self, module: str) -> list[str]:
        """Names of all parameters in a module and inside it, each beginning with `module` as the caller spells it."""
        owners = {".".join(name.split(".")[:depth]) for name in self.shapes for depth in range(1, name.count(".") + 1)}
        related = [owner for owner in owners if owner == module or _differ_by_wrapper(owner, module)]
        own = module if module in related else (related[0] if len(related) == 1 else None)
        if own is None:
            return []
        return [f"{module}{name.removeprefix(own)}" for name in self.shapes if name.startswith(f"{own}.")]

    # Ties

    def owner(self, parameter: str) -> str | None:
        """The parameter whose stored tensor `parameter` uses: itself or one it is tied to; None if none is stored."""
        return next((name for name in self.tie_group(parameter) if name in self.stored), None)

    def tie_group(self, parameter: str) -> list[str]:
        """All parameters of the model that share one tensor with this one, itself included."""
        root = self.tied.get(parameter, parameter)
        return [root, *(name for name, owner in self.tied.items() if owner == root)]

    # Values

    def get(self, parameter: str) -> StoredTensor | None:
        """The stored tensor that a parameter of the model is loaded from; None if there is none."""
        owner = self.owner(parameter)
        return None if owner is None else self.tensors[self.stored[owner]]

    def value(self, name: str, wanted_by: str) -> Tensor:
        """A parameter itself, on the CPU, in its shape and in the dtype that it is stored in.

        Raises:
            ValueError: there is no such parameter, only shapes are known, or it is not stored as floating numbers.
        """
        found = self.parameter(name, wanted_by)
        if not self.has_values:
            raise ValueError(
                f"{wanted_by}: the values of tensor {name!r} are needed, and of the base {self.where} only shapes are "
                "known; pass a checkpoint folder or a loaded model"
            )
        stored = self.get(found)
        if stored is None:
            parts = self.converted.get(found)
            reason = f"it is stored in another layout, as {parts[0]!r} ..." if parts else "it is not stored there"
            raise ValueError(f"{wanted_by}: the values of tensor {name!r} cannot be read from {self.where}: {reason}")
        if stored.dtype is None or not stored.dtype.is_floating_point:
            raise ValueError(
                f"{self.where}: tensor {name!r} is stored as {stored.dtype}; pass the checkpoint that is not quantized"
            )
        return stored.read().view(stored.shape)


def _differ_by_wrapper(a: str, b: str) -> bool:
    """Whether one of two names is the other behind leading parts that a wrapper gives, such as ``0.auto_model``."""
    short, long = sorted((a, b), key=len)
    if not long.endswith(f".{short}"):
        return False
    wrapper = long.removesuffix(f".{short}").split(".")
    # A number further inside counts blocks: `layers.5.norm` is not the `norm` at the end of the model.
    return not any(part.isdigit() for part in wrapper[1:])


Source = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module
Base = str | os.PathLike[str] | nn.Module | PretrainedConfig | Mapping[str, Sequence[int]] | Checkpoint


def same_contents(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every entry; they are read piece by piece."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(torch.equal(a.read(start, stop), b.read(start, stop)) for start, stop in a.pieces())


def open_checkpoint(source: Source, what: str) -> Checkpoint:
    """Open a checkpoint that holds values; no tensor is read yet.

    Args:
        source: a folder (safetensors or ``.bin``, sharded or not), one such file, a state dict, or a model.
        what: what messages call the source, such as "base".

    Raises:
        FileNotFoundError: the source does not exist, it has no weights, or a shard is missing.
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


def open_base(base: Base) -> Checkpoint:
    """Open the base model of an adapter, to look up names, shapes and, if there are any, values; no tensor is read yet.

    Args:
        base: a checkpoint folder (or one with just a ``config.json``), one weight file, a model, a transformers config,
            or a dict from parameter names to shapes. A `Checkpoint` is returned as it is.

    Raises:
        FileNotFoundError: a folder or shard is missing; the message names it.
        ValueError: a file cannot be read, or the model has an adapter on it.
    """
    if isinstance(base, Checkpoint):
        return base
    if isinstance(base, nn.Module):
        if any(".base_layer." in name for name, _ in base.named_parameters()):
            raise ValueError("base: pass the base model without an adapter on it (model.unload() takes adapters off)")
        where = f"model {type(base).__name__}"
        on_meta = any(parameter.is_meta for parameter in base.parameters())
        return _shapes_only(where, ModelNames.of(base)) if on_meta else open_checkpoint(base, where)
    if isinstance(base, PretrainedConfig):
        model = _meta_model(base)
        return _shapes_only(f"model {type(model).__name__}", ModelNames.of(model))
    if isinstance(base, Mapping):
        shapes = {name: tuple(getattr(shape, "shape", shape)) for name, shape in base.items()}
        return Checkpoint("(given as shapes)", has_values=False, shapes=shapes)
    path = Path(base)
    if path.is_dir() and (path / "config.json").is_file() and not any(path.glob("*.safetensors*")):
        names = None if any(path.glob("pytorch_model*")) else names_of_folder(path)
        if names is not None:
            return _shapes_only(str(path), names)
    return open_checkpoint(path, "base")


def _shapes_only(where: str, names: ModelNames) -> Checkpoint:
    checkpoint = Checkpoint(where, has_values=False)
    checkpoint.use_names(names)
    return checkpoint


def _meta_model(config: PretrainedConfig) -> nn.Module:
    names = getattr(config, "architectures", None) or []
    model_class = getattr(transformers, names[0], None) if names else None
    if model_class is None:
        raise ValueError(
            f"base: the config names no architecture that transformers knows ({names}); pass a checkpoint folder or "
            "the model itself"
        )
    with torch.device("meta"):
        return model_class(config)


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
        file_within(folder, folder / name)
        held = _read_file(folder / name)
        missing = sorted(set(expected or ()) - set(held))
        if missing:
            raise ValueError(f"{folder / name} lacks the tensor {missing[0]!r} that the index says is in it")
        for key in tensors.keys() & held.keys():
            if not same_contents(tensors[key], held[key]):
                raise ValueError(f"{folder}: {tensors[key].where} and {name} hold different tensors {key!r}; drop one")
        files[name] = list(held)
        tensors.update(held)
    checkpoint = Checkpoint(str(folder), tensors, files)
    checkpoint.use_names(names_of_folder(folder))
    return checkpoint


def _weight_files(folder: Path) -> dict[str, list[str] | None]:
    """The files that hold a folder's weights, each with the tensors that the index expects there (None: no index)."""
    for single in SINGLE_FILES:
        index = folder / (single + INDEX_SUFFIX)
        if index.is_file():
            shards: dict[str, list[str] | None] = {}
            weight_map = json_object(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index} has no weight_map")
            for tensor, name in weight_map.items():
                if not isinstance(name, str) or Path(name).name != name:
                    raise ValueError(f"{index}: tensor {tensor!r} is in {name!r}, which is not a file of this folder")
                shards.setdefault(name, []).append(tensor)  # type: ignore[union-attr]
            _refuse_one_name(shards, index)
            return {name: shards[name] for name in sorted(shards)}
        if (folder / single).is_file():
            return {single: None}
    if (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} holds an adapter, not a model's weights: no model.safetensors in it")
    raise FileNotFoundError(f"{folder / SINGLE_FILES[0]} is missing, and so is an index of shards")


def safetensors_name(file: str) -> str:
    """The name of the safetensors file that the tensors of a checkpoint's file are written to."""
    return file.replace("pytorch_model", "model").removesuffix(".bin").removesuffix(".safetensors") + ".safetensors"


def _refuse_one_name(shards: Iterable[str], index: Path) -> None:
    """Raise a ValueError if two shards would be written to one file; some file systems take no notice of case."""
    written: dict[str, str] = {}
    for name in sorted(shards):
        other = written.setdefault(safetensors_name(name).casefold(), name)
        if other != name:
            raise ValueError(
                f"{index} names the shards {other!r} and {name!r}, which would both be written to "
                f"{safetensors_name(name)!r}; rename one of the two, in the index too"
            )


def _read_file(path: Path) -> Mapping[str, StoredTensor]:
    if path.suffix in (".bin", ".pt", ".pth") and path.is_file():
        return read_pickled(path)
    return read_safetensors(path)


def refuse_quantized(folder: Path) -> None:
    """Raise a ValueError if the weights of a folder are stored quantized."""
    quantized = json_object(folder / "config.json").get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
        raise ValueError(
            f"{folder} holds weights quantized with {method!r} (quantization_config in config.json), which cannot be "
            "changed entry by entry. Give the original full-precision checkpoint; to merge into the values that the "
            "quantized weights stand for, give it together with quantization_config."
        )
