"""What the tensors of a checkpoint are called in the model that it is loaded into, and which of them are tied."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
