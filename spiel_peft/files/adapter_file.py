"""Reads and writes adapter folders as plain tensors, without a model."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Collection, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adapter_format import DELTA_KEYS, MARKER, check_indices_and_values, split_file_key
from ..card import FILE_NAME as CARD
from ..card import facts_of_counts, update_card
from ..checks import config_object
from ..config import SpIELConfig, names_module
from ..state import STATE_KEYS
from .folder import whole_folder
from .tensors import load_pickled

PREFIX = "base_model.model."
# Ends the key of the rows of an embedding that PEFT trains token by token.
TOKENS = ".token_adapter.trainable_tokens_delta"
_SELECTION = (
    "r",
    "density",
    "num_deltas",
    "rank_pattern",
    "density_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)


@dataclass(frozen=True)
class StoredDelta:
    """The sparse difference to one weight.

    Attributes:
        indices: ``[k]`` sorted unique flat positions in the weight as the model stores it, int32 or int64.
        values: ``[k]`` floating.
    """

    indices: Tensor
    values: Tensor

    @property
    def k(self) -> int:
        return self.indices.numel()


@dataclass
class AdapterFile:
    """The content of a SpIEL adapter folder, without training state.

    Attributes:
        config: its config.
        deltas: by the name of the adapted module in the base model, such as ``model.layers.0.self_attn.q_proj``; the
            weight is that name with ``.weight``.
        others: all other tensors (modules saved in full, biases, trained tokens), by key without PEFT's prefix.
    """

    config: SpIELConfig
    deltas: dict[str, StoredDelta]
    others: dict[str, Tensor] = field(default_factory=dict)

    def token_rows(self, key: str, where: str) -> tuple[str, Tensor] | None:
        """The parameter and the rows ``[n]`` int64 that a tensor of `others` holds; None if it holds no single rows.

        Raises:
            ValueError: ``trainable_token_indices`` does not name the rows; `where` names the file in the message.
        """
        if not key.endswith(TOKENS):
            return None
        module = key.removesuffix(TOKENS)
        chosen = trained_rows(self.config, module)
        if chosen is None:
            raise ValueError(
                f"{where}: tensor {key!r}: trainable_token_indices of the config does not say which rows it holds"
            )
        return f"{module}.weight", torch.tensor(chosen, dtype=torch.int64)


def trained_rows(config: SpIELConfig, module: str) -> list[int] | None:
    """The rows of an embedding that are trained token by token; None if the config names none of it."""
    chosen = config.trainable_token_indices
    if isinstance(chosen, Mapping):
        chosen = next((rows for name, rows in chosen.items() if names_module(name, module)), None)
    return list(chosen) if chosen else None


def parameter_of_key(key: str) -> str:
    """The parameter that a tensor saved in full belongs to; PEFT's key has the names of wrappers in it."""
    return key.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFile:
    """Read an adapter folder and check it as a whole.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).

    Raises:
        FileNotFoundError: the folder or one of the two files is missing; the message names it.
        ValueError: the adapter is of another method, or a tensor is damaged; the message names file and tensor.
    """
    return read_whole_adapter(Path(folder))[0]


def read_whole_adapter(folder: Path) -> tuple[AdapterFile, Path, dict[str, Tensor]]:
    """Read as `read_adapter` does; also return the path of the tensors' file and all tensors in it, by key."""
    config = read_config(folder)
    if not isinstance(config, SpIELConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{folder} is not a SpIEL adapter: its peft_type is {kind!r}")
    path, tensors = read_tensors(folder)
    deltas, others = split_tensors(tensors, str(path))
    return AdapterFile(config, deltas, others), path, tensors


def config_of_deltas(deltas: Mapping[str, StoredDelta], like: SpIELConfig | None = None, **fields: Any) -> SpIELConfig:
    """Make a config whose budget is the number of these deltas by module, as loading a converted adapter needs it.

    Args:
        deltas: by module name. A config cannot name modules without entries: leave them out.
        like: take the other fields from this config.
        fields: override single fields.
    """
    kept = {} if like is None else {f.name: copy(getattr(like, f.name)) for f in dataclass_fields(like) if f.init}
    # The fields that select and count deltas, and the one that the constructor sets by itself.
    for name in (*_SELECTION, "peft_type"):
        kept.pop(name, None)
    return SpIELConfig(**{**kept, "num_deltas": {name: delta.k for name, delta in deltas.items()}, **fields})


def read_config(folder: Path) -> PeftConfig:
    """The config of an adapter of any method. Raises FileNotFoundError or ValueError, naming the file."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} is not an adapter folder")
    config_object(path)
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as an adapter's config: {error}") from error


def read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The path of an adapter's tensors' file and all tensors in it, on the CPU, by their keys in the file."""
    path = tensors_file(folder)
    if path is None:
        raise FileNotFoundError(f"{folder / SAFETENSORS_WEIGHTS_NAME} is missing")
    try:
        if path.name == SAFETENSORS_WEIGHTS_NAME:
            return path, load_file(path)
        return path, {name: tensor.clone() for name, tensor in load_adapter_pickle(path).items()}
    except (SafetensorError, RuntimeError, LookupError, TypeError, AttributeError, ValueError, OSError) as error:
        said = str(error)
        raise ValueError(said if str(path) in said else f"{path} cannot be read: {said}") from error


def tensors_file(folder: Path) -> Path | None:
    """The file of an adapter folder that holds its tensors; None if there is none.

    Raises:
        ValueError: something else has the name of that file, such as a folder or a pipe; the message names it.
    """
    for path in (folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME):
        if path.is_file():
            return path
        if os.path.lexists(path):
            raise ValueError(f"{path} is not a file")
    return None


def load_adapter_pickle(path: Path) -> dict[str, Tensor]:
    """`load_pickled` of an ``adapter_model.bin``: mapped into memory, unless it is of a PyTorch before 1.6."""
    return load_pickled(path, mmap=zipfile.is_zipfile(path))


def unannounced(
    keys: Iterable[str], config: SpIELConfig, embeddings: Collection[Collection[str]] | None = None
) -> list[str]:
    """The keys of an adapter file that its config does not announce, in alphabetical order.

    This is the list of what an adapter file may hold: deltas with their training state; modules of `modules_to_save`;
    trained tokens; the biases that `bias` names; and embeddings where PEFT saves them (`save_embedding_layers`): the
    base layer of one that is adapted, or else the input and the output embedding of the model, both of them.

    Args:
        keys: without PEFT's prefix.
        config: config of the adapter.
        embeddings: names of the model's embeddings, those of one weight together. None if the model is not known: all
            that PEFT knows by name are accepted, also one of them alone.
    """
    keys = list(keys)
    adapted = {parts[0] for parts in map(split_file_key, keys) if parts is not None}
    held = {parent for key in keys for parent in parents(key)}
    known = set(EMBEDDING_LAYER_NAMES) if embeddings is None else {name for names in embeddings for name in names}
    groups = [{name} for name in known] if embeddings is None else map(set, embeddings)
    whole = known if all(any(names_module(name, p) for p in held for name in names) for names in groups) else set()
    # Without the model, a lone embedding may be all that there is, or be tied to the other one.
    single = known - whole if embeddings is None else set()
    of_adapted = {name for name in adapted if any(names_module(embedding, name) for embedding in known)}
    return sorted(
        key
        for key in keys
        if not _is_of_delta(key)
        and not _is_full_module(key, config)
        and not _is_bias(key, config, adapted)
        and not (key.endswith(TOKENS) and config.trainable_token_indices)
        and not any(names_module(name, parent) for parent in parents(key) for name in whole)
        and not any(names_module(name, key.rpartition(".")[0]) for name in single)
        and not any(key.startswith(f"{name}.base_layer.") for name in of_adapted)
    )


def _is_of_delta(key: str) -> bool:
    parts = split_file_key(key)
    return parts is not None and parts[1] in DELTA_KEYS


def _is_full_module(key: str, config: SpIELConfig) -> bool:
    """Whether a key is of a module that the config saves in full; PEFT leaves its wrapper's names out of the key."""
    return any(
        names_module(owner, parent)
        and not {"modules_to_save", "original_module"} & set(key.removeprefix(f"{parent}.").split("."))
        for owner in config.modules_to_save or ()
        for parent in parents(key)
    )


def _is_bias(key: str, config: SpIELConfig, adapted: set[str]) -> bool:
    if config.bias == "none" or not f".{key}".endswith(".bias"):
        return False
    module = key.rpartition(".")[0]
    return config.bias == "all" or module in adapted or module.endswith(".base_layer")


def parents(name: str) -> list[str]:
    """The names of all modules that hold a parameter, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def split_tensors(tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, StoredDelta], dict[str, Tensor]]:
    """Sort an adapter's tensors into deltas and others, and leave out training state.

    Args:
        tensors: by key, with or without PEFT's prefix.
        where: names the file in messages.

    Raises:
        ValueError: indices or values are missing or damaged.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        key = key.removeprefix(PREFIX)
        parts = split_file_key(key)
        if parts is None:
            others[key] = tensor
        elif parts[1] not in STATE_KEYS:
            modules.setdefault(parts[0], {})[parts[1]] = tensor
    deltas = {}
    for module, entries in modules.items():
        problem = check_indices_and_values(entries, None)
        if problem is None and set(entries) != {"indices", "values"}:
            name = min(set(entries) - {"indices", "values"})
            problem = name, "is not a tensor of a SpIEL delta"
        if problem is not None:
            name, what = problem
            raise ValueError(f"{where}: tensor '{module}{MARKER}{name}' {what}")
        deltas[module] = StoredDelta(entries["indices"], entries["values"])
    return deltas, others


def write_adapter(adapter: AdapterFile, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write an adapter folder that `PeftModel.from_pretrained` loads, with a model card, whole or not at all.

    Args:
        adapter: its deltas are checked first. Its config is saved as it is and must state the number of its deltas:
            see `config_of_deltas`.
        folder: where to write; made if it does not exist.
        overwrite: replace what is there.

    Raises:
        ValueError: a delta is damaged. FileExistsError: see `whole_folder`.
    """
    tensors = {f"{PREFIX}{key}": tensor.contiguous() for key, tensor in adapter.others.items()}
    for module, delta in adapter.deltas.items():
        tensors[f"{PREFIX}{module}{MARKER}indices"] = delta.indices.contiguous()
        tensors[f"{PREFIX}{module}{MARKER}values"] = delta.values.contiguous()
    split_tensors(tensors, str(folder))
    with whole_folder(folder, overwrite) as work:
        adapter.config.save_pretrained(str(work))
        save_file(_apart(tensors), work / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        if (Path(folder) / CARD).is_file():
            shutil.copyfile(Path(folder) / CARD, work / CARD)  # to keep the text that a user wrote in it
        counts = {module: delta.k for module, delta in adapter.deltas.items()}
        update_card(work, [facts_of_counts(adapter.config, counts)])


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clone tensors that share memory, as those of tied weights do: the file format stores each by itself."""
    seen: set[int] = set()
    out = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        out[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return out
