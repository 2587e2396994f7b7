"""The names of a model's parameters, and the parameter that each tensor of a checkpoint is loaded into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..checks import json_object, short
from ..weights.base_weight import BaseInfo, inspect_base

# The model classes of PEFT's tasks that put a head on a base model.
_HEADS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
# A module is built for each of these parts of a model.
_COUNTS, _MOST_PARTS = ("layers", "layer", "blocks", "experts", "depth"), 10_000


@dataclass
class ModelNames:
    """The modules and parameters of a model, without their data.

    Attributes:
        model: the model, usually on the meta device.
        modules: its modules by full name.
        parameters: shapes by full parameter name.
        tied: for every parameter that shares the storage of another one, the name of that one.
        prefix: what transformers puts before the names of a model's body when it adds a head, such as "bert".
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    parameters: dict[str, tuple[int, ...]]
    tied: dict[str, str] = field(default_factory=dict)
    prefix: str = ""

    @classmethod
    def of(cls, model: nn.Module) -> ModelNames:
        """Take the names of a model in memory or on the meta device; parameters that are one object are tied."""
        shared: dict[int, list[str]] = {}
        parameters: dict[str, tuple[int, ...]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameters[name] = tuple(parameter.shape)
            shared.setdefault(id(parameter), []).append(name)
        # A model on the meta device is not tied yet; transformers lists there what will be tied, and to which owner.
        expanded = getattr(model, "all_tied_weights_keys", None) or {}
        tied = {name: owner for name, owner in expanded.items() if name in parameters and owner in parameters}
        for group in shared.values():
            owner = next((tied[name] for name in group if name in tied), group[0])
            tied.update(dict.fromkeys((name for name in group if name != owner), owner))
        modules = dict(model.named_modules(remove_duplicate=False))
        return cls(model, modules, parameters, tied, getattr(model, "base_model_prefix", "") or "")

    def find(self, name: str) -> str | None:
        """The parameter of this name, which may have the head's prefix or lack it; None if there is none."""
        for candidate in (name, f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}.")):
            if candidate in self.parameters:
                return candidate
        return None

    @cached_property
    def infos(self) -> dict[str, BaseInfo]:
        """What `inspect_base` says of every module that can carry a delta, by full name."""
        infos = {name: inspect_base(module) for name, module in self.modules.items()}
        return {name: info for name, info in infos.items() if isinstance(info, BaseInfo)}


def names_of_folder(folder: Path) -> ModelNames | None:
    """The names of the model that a folder's ``config.json`` describes; None if transformers does not know the model.

    The model is built on the meta device by transformers' own classes; code in the folder is not run.

    Raises:
        ValueError: ``config.json`` is damaged, or no model can be built from it.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    settings = json_object(path)
    if "model_type" not in settings:
        return None
    _refuse_endless(path, settings)
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (ValueError, KeyError, ImportError, OSError):
        return None  # this version of transformers does not know the model
    except Exception as error:  # values of wrong types can raise anything in a config's constructor
        raise ValueError(f"{path} is no config of {settings['model_type']!r} models: {short(str(error))}") from error
    names = settings.get("architectures") or [""]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ValueError(f"{path}: architectures must be a list of names, got {short(names)}")
    architecture = names[0]
    kind = getattr(transformers, str(architecture), None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    try:
        with torch.device("meta"):
            model = kind(config) if known else transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, ImportError):
        return None
    except Exception as error:  # a damaged config can raise anything in a model's constructor
        raise ValueError(f"{path}: {architecture or 'the model'} cannot be built from it: {error}") from error
    return ModelNames.of(model)


def _refuse_endless(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise a ValueError if the config asks for more layers, experts and the like than could be built in a moment."""
    for name, value in settings.items():
        if isinstance(value, dict):
            _refuse_endless(path, value)
        elif isinstance(value, int) and value > _MOST_PARTS and name.endswith(_COUNTS):
            raise ValueError(f"{path}: {name} must be at most {_MOST_PARTS}, got {short(value)}")


def names_with_head(
    folder: Path, task_type: str | None, tensors: Mapping[str, torch.Size]
) -> tuple[ModelNames, dict[str, Any]] | None:
    """The names of a folder's model with the head of a task put on it, for an adapter that was trained with that head.

    Args:
        folder: holds a ``config.json`` of transformers.
        task_type: the task in PEFT's words, such as "SEQ_CLS".
        tensors: shapes of the tensors that the adapter saved in full, by parameter name. Their first dimensions are
            tried as the number of labels.

    Returns:
        ``(names, fields)``: the fields are those that ``config.json`` must have for such a model. None if no number of
        labels gives a model with these tensors.
    """
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
    """Find the parameter that each tensor of a checkpoint is loaded into.

    Args:
        keys: names of the stored tensors.
        names: the names of the model that loads them.

    Returns:
        ``(stored, converted)``, both by parameter name: the name of the stored tensor; and, for a parameter that
        transformers computes from tensors of another layout (fused experts), the names of all of these.
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
    """By stored name: the name that transformers gives the tensor, and whether it converts the layout as well."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(names.model)
    except (ImportError, AttributeError, TypeError):
        return {key: (key, False) for key in keys}  # not a transformers model, or a version without this machinery
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
    """The dict in which transformers looks up whether a parameter exists; only its keys matter."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        super().__init__(dict.fromkeys(names, True))
