"""Names, shapes and values of a base model's tensors, from whatever the user has of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..weights.base_weight import BaseInfo, inspect_base
from .checkpoint import Checkpoint, ModelNames, names_of_folder, open_checkpoint

Base = str | os.PathLike[str] | nn.Module | PretrainedConfig | Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class BaseTensors:
    """What is known of a base model's tensors.

    Attributes:
        where: how messages name the base.
        shapes: of every parameter, by its name in the model; of quantized weights the dequantized shapes.
        infos: what `inspect_base` says of every module that can carry a delta; None if the modules are not known.
        checkpoint: where values are read, if there are any.
    """

    where: str
    shapes: dict[str, tuple[int, ...]]
    infos: dict[str, BaseInfo] | None = None
    checkpoint: Checkpoint | None = None

    def find(self, name: str) -> str | None:
        """The base's name of a parameter: the same, or the only one that differs by leading parts; None without one.

        What an adapter was trained on may have such a prefix more or less (``encoder.0.weight`` and
        ``bert.encoder.0.weight``).

        Raises:
            ValueError: several parameters could be meant.
        """
        if name in self.shapes:
            return name
        found = [n for n in self.shapes if n.endswith(f".{name}") or name.endswith(f".{n}")]
        if len(found) > 1:
            raise ValueError(f"{self.where}: tensor {name!r} could be any of {sorted(found)[:3]}")
        return found[0] if found else None

    def name(self, name: str, wanted_by: str) -> str:
        """As `find`. Raises ValueError, naming the file that wants the parameter, if the base does not have it."""
        found = self.find(name)
        if found is None:
            raise ValueError(f"{wanted_by}: the base {self.where} has no tensor {name!r}; is it another model's?")
        return found

    def weight_of(self, module: str) -> str:
        """Name of the parameter that the deltas of a module belong to: a bare parameter goes by its own name."""
        return module if self.find(module) is not None else f"{module}.weight"

    def shape(self, name: str, wanted_by: str) -> tuple[int, ...]:
        """Shape of a parameter. Raises ValueError as `name` does."""
        return self.shapes[self.name(name, wanted_by)]

    def info(self, module: str) -> BaseInfo | None:
        """The description of a module, None if it cannot carry deltas or the modules are not known."""
        weight = self.find(f"{module}.weight")
        return None if weight is None or self.infos is None else self.infos.get(weight.removesuffix(".weight"))

    def value(self, name: str, wanted_by: str) -> Tensor:
        """A parameter itself, on the CPU, in the dtype the base stores it in.

        Raises:
            ValueError: the base does not have it, only shapes are known, or it is not stored as floating numbers.
        """
        found = self.name(name, wanted_by)
        if self.checkpoint is None:
            raise ValueError(
                f"{wanted_by}: the values of tensor {name!r} are needed, and of the base {self.where} only shapes are "
                "known; pass a checkpoint folder or a loaded model"
            )
        stored = self.checkpoint.get(found)
        if stored is None:
            parts = self.checkpoint.converted.get(found)
            reason = f"it is stored in another layout, as {parts[0]!r} ..." if parts else "it is not stored there"
            raise ValueError(f"{wanted_by}: the values of tensor {name!r} cannot be read from {self.where}: {reason}")
        if stored.dtype is None or not stored.dtype.is_floating_point:
            raise ValueError(
                f"{self.where}: tensor {name!r} is stored as {stored.dtype}; pass the checkpoint that is not quantized"
            )
        return stored.read().view(stored.shape)

    def stored_name(self, name: str, wanted_by: str) -> str:
        """What a parameter is called in the checkpoint's files. The base must have values."""
        owner = self.owner(name, wanted_by)
        return owner if self.checkpoint is None else self.checkpoint.stored.get(owner, owner)

    def owner(self, name: str, wanted_by: str) -> str:
        """The parameter whose stored tensor this one uses: itself, or the one that it is tied to."""
        found = self.name(name, wanted_by)
        return found if self.checkpoint is None else self.checkpoint.owner(found) or found

    def tied_to(self, name: str, wanted_by: str) -> list[str]:
        """Other parameters that share the tensor of this one."""
        found = self.name(name, wanted_by)
        return [] if self.checkpoint is None else [n for n in self.checkpoint.tie_group(found) if n != found]

    @property
    def has_values(self) -> bool:
        return self.checkpoint is not None

    def tensors_of(self, module: str) -> list[str]:
        """Names of all tensors in a module and what is inside it, with the module named as the caller does."""
        owners = {".".join(name.split(".")[:depth]) for name in self.shapes for depth in range(1, name.count(".") + 1)}
        related = [o for o in owners if o == module or o.endswith(f".{module}") or module.endswith(f".{o}")]
        own = module if module in related else (related[0] if len(related) == 1 else None)
        if own is None:
            return []
        return [f"{module}{name.removeprefix(own)}" for name in self.shapes if name.startswith(f"{own}.")]


def open_base(base: Base | BaseTensors) -> BaseTensors:
    """Look into a base model; no weight is read.

    Args:
        base: a checkpoint folder (or one with just a ``config.json``), one weight file, a model, a transformers config,
            or a dict from parameter names to shapes.

    Raises:
        FileNotFoundError: a folder or shard is missing. ValueError: a file cannot be read; both name it.
    """
    if isinstance(base, BaseTensors):
        return base
    if isinstance(base, nn.Module):
        return _of_model(base)
    if isinstance(base, PretrainedConfig):
        return _of_model(_meta_model(base))
    if isinstance(base, Mapping):
        shapes = {name: tuple(getattr(shape, "shape", shape)) for name, shape in base.items()}
        return BaseTensors("(given as shapes)", shapes)
    path = Path(base)
    if path.is_dir() and (path / "config.json").is_file() and not any(path.glob("*.safetensors*")):
        names = None if any(path.glob("pytorch_model*")) else names_of_folder(path)
        if names is not None:
            return _of_names(str(path), names, None)
    checkpoint = open_checkpoint(path, "base")
    if checkpoint.names is not None:
        return _of_names(checkpoint.where, checkpoint.names, checkpoint)
    shapes = {name: checkpoint.tensors[stored].shape for name, stored in checkpoint.stored.items()}
    return BaseTensors(checkpoint.where, shapes, None, checkpoint)


def _of_model(model: nn.Module) -> BaseTensors:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if any(".base_layer." in name for name in parameters):
        raise ValueError("base: pass the base model without an adapter on it (model.unload() takes adapters off)")
    where = f"model {type(model).__name__}"
    on_meta = any(parameter.is_meta for parameter in parameters.values())
    checkpoint = None if on_meta else open_checkpoint(model, where)
    return _of_names(where, ModelNames.of(model), checkpoint)


def _of_names(where: str, names: ModelNames, checkpoint: Checkpoint | None) -> BaseTensors:
    shapes = dict(names.parameters)
    infos = {}
    for name, module in names.modules.items():
        info = inspect_base(module)
        if isinstance(info, BaseInfo):
            infos[name] = info
            shapes[f"{name}.weight"] = info.weight_shape
    for name in checkpoint.stored if checkpoint is not None else ():
        # What the folder's own class does not have, such as the head of another one.
        shapes.setdefault(name, checkpoint.get(name).shape)
    return BaseTensors(where, shapes, infos, checkpoint)


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
