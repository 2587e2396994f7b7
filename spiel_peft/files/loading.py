"""Loads adapters into a model whole or not at all: wraps the loaders of PEFT and transformers."""

from __future__ import annotations

import inspect
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.integrations import PeftAdapterMixin

from ..adapter_format import MARKER, not_finite
from ..checks import config_object, first_of
from ..config import SpIELConfig
from ..delta import SparseDelta
from .adapter_file import PREFIX, load_adapter_pickle, tensors_file, unannounced
from .tensors import read_safetensors

# PyTorch's wrapper for activation checkpoints adds this to the names of modules, but not to the keys of state dicts.
CHECKPOINTED = "_checkpoint_wrapped_module."
REFUSED = "The adapter file is refused, nothing was loaded"
# A delta takes 2 bytes for its value and 4 for its index at least. Files that lack some modules are reported by PEFT,
# so a file is given room for 16 times the deltas that it can hold, and for some more if it is small.
_BYTES_PER_DELTA = 6
_ROOM, _SMALL = 16, 1 << 20


class ModelStructure:
    """A copy of everything that adding or loading an adapter changes in a model, but for entries of tensors.

    Args:
        model: the model before the change.
    """

    def __init__(self, model: nn.Module) -> None:
        self.attributes = [
            (module, dict(vars(module)), [(value, copy(value)) for value in vars(module).values() if _holds(value)])
            for module in model.modules()
        ]
        self.parameters = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
        self.runs = [delta.run for delta in model.modules() if isinstance(delta, SparseDelta)]

    def restore(self) -> None:
        """Put children, attributes, hooks, parameters and their `requires_grad` back to what they were."""
        for module, attributes, containers in self.attributes:
            vars(module).clear()
            vars(module).update(attributes)
            for container, content in containers:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, data, requires_grad in self.parameters:
            if parameter.dtype != data.dtype or parameter.device != data.device:  # a cast, which replaces the data
                parameter.data = data
            parameter.requires_grad = requires_grad


def _holds(value: object) -> bool:
    return type(value) in (dict, OrderedDict, list, set)


class Loading:
    """What a loader is about to change in a model.

    Attributes:
        max_deltas: the most deltas that an adapter may get whose file is being loaded; None if that is not known.
    """

    def __init__(self, model: nn.Module, max_deltas: int | None) -> None:
        self.max_deltas = max_deltas
        self._structure = ModelStructure(model)
        self._tensors: list[tuple[Tensor, Tensor]] = []

    def keep(self, tensors: Iterable[Any]) -> None:
        """Copy tensors of the model that will be written to."""
        self._tensors += [(t, t.detach().clone()) for t in tensors if isinstance(t, Tensor) and not t.is_meta]

    def undo(self) -> None:
        """Put the model back to what it was."""
        with torch.no_grad():
            for tensor, before in self._tensors:
                tensor.copy_(before)
        self._structure.restore()


_NOW: ContextVar[Loading | None] = ContextVar("spiel_loading", default=None)


@contextmanager
def whole_or_not(model: nn.Module, max_deltas: int | None = None) -> Iterator[Loading]:
    """Undo all changes of the block to the model if it is left by an exception, Ctrl-C too.

    Within another such block nothing is done: that one undoes everything.
    """
    outer = _NOW.get()
    if outer is not None:
        yield outer
        return
    loading = Loading(model, max_deltas)
    token = _NOW.set(loading)
    try:
        yield loading
    except BaseException:
        loading.undo()
        raise
    finally:
        _NOW.reset(token)


def refuse_more_than_file(config: SpIELConfig, counts: Collection[int]) -> None:
    """Refuse the budget of a file's config before its deltas are made, if they are far more than the file can hold.

    Raises:
        ValueError: names the field that asks for them.
    """
    loading = _NOW.get()
    if loading is None or loading.max_deltas is None or sum(counts) <= loading.max_deltas:
        return
    field = "num_deltas" if config.num_deltas is not None else "density" if config.density is not None else "r"
    raise ValueError(
        f"{REFUSED}: adapter_config.json asks for {sum(counts)} deltas in {len(counts)} modules (`{field}`, "
        "`rank_pattern`, `density_pattern`), which the file of its tensors is far too small for. Give the folder the "
        "config that its tensors were saved with."
    )


def refuse_unannounced(
    model: nn.Module, config: SpIELConfig, adapter_name: str, keys: Iterable[str], known: Collection[str] = ()
) -> None:
    """Refuse an adapter file with tensors that its config does not announce: they could overwrite base weights.

    Args:
        model: the model, with the new adapter.
        config: config of the adapter.
        adapter_name: name of the adapter.
        keys: keys of the file, with or without PEFT's prefix.
        known: keys that belong to modules saved in full, or to trained tokens.

    Raises:
        ValueError: names the first tensors.
    """
    bare = [key.removeprefix(PREFIX) for key in keys if key not in known]
    if _NOW.get() is None:
        # No loader reads a file: the program itself hands a state dict to `set_peft_model_state_dict`. PEFT promises
        # that this also restores biases in a model whose config does not train them.
        bare = [key for key in bare if not key.endswith(".bias")]
    odd = set(unannounced(bare, config, _embeddings(model)))
    others = [f".modules_to_save.{name}." for name in getattr(model, "peft_config", {}) if name != adapter_name]
    odd.update(key for key in bare for other in others if other in key)
    if odd:
        raise ValueError(
            f"{REFUSED}: its config does not announce {len(odd)} of its tensors, which would overwrite the base model "
            f"or another adapter ({first_of([repr(key) for key in sorted(odd)])}). Take them out of the file, or name "
            "them in its config (modules_to_save, bias, trainable_token_indices)"
        )


def _embeddings(model: nn.Module) -> list[set[str]]:
    """Names of the input and the output embedding in the base model; together if they share a weight."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: dict[int, set[str]] = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(base, getter)()
        except (AttributeError, NotImplementedError):
            continue
        names = {clean_name(name) for name, other in base.named_modules() if module is not None and other is module}
        if names:
            found.setdefault(id(getattr(module, "weight", module)), set()).update(names)
    return list(found.values())


def clean_name(name: str) -> str:
    """The name of a module without the names of wrappers of torch.compile, activation checkpoints and adapters."""
    return name.replace("_orig_mod.", "").replace(CHECKPOINTED, "").removesuffix(".base_layer")


def full_modules(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Keys of the modules that an adapter has in full, and of its trained tokens: in files, by the key in the model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            name = name.removeprefix("_fsdp_wrapped_module.")
            for stored, live in module.adapter_state_dict_load_map(adapter_name).items():
                found[f"{name}.{live}"] = f"{name}.{stored}"
    return found


# The loaders


Check = Callable[[nn.Module, str, Mapping[str, torch.dtype | None]], None]


def guard_loaders(check: Check) -> None:
    """Make the loaders of PEFT and transformers load a SpIEL adapter whole or not at all.

    They add the adapter to the model first and read its file then, and there is no hook that hears of a failure in
    between. Adapters of other methods are left to the loaders as they are.

    Args:
        check: refuses a file by the dtypes of its tensors; for transformers' loader, see `check_header` in `saving`.
    """
    places = ((PeftModel, "from_pretrained"), (PeftModel, "load_adapter"), (PeftAdapterMixin, "load_adapter"))
    for owner, name in places:
        loader = vars(owner)[name]
        loader = getattr(loader, "__func__", loader)
        original = getattr(loader, "_spiel_original", loader)  # of an earlier import of this package
        guarded = _guarded(original, check)
        guarded._spiel_original = original  # type: ignore[attr-defined]
        setattr(owner, name, classmethod(guarded) if name == "from_pretrained" else guarded)


def _guarded(original: Callable[..., Any], check: Check) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return original(*args, **kwargs)
        folder = _local_folder(given)
        if _NOW.get() is not None or not _may_be_spiel(given, folder):
            return original(*args, **kwargs)
        model = given.get("model", given.get("self"))
        name = given.get("adapter_name") or "default"
        with whole_or_not(model, _max_deltas(folder)), _file_checked(model, name, check):
            try:
                result = original(*args, **kwargs)
            except KeyError as error:
                if "trainable_tokens_delta" not in str(error):
                    raise
                # PEFT takes for granted that they are in the file.
                raise ValueError(
                    f"{REFUSED}: its config has trainable_token_indices, but tensor {error} is missing"
                ) from error
            _check_loaded(result if isinstance(result, nn.Module) else model, name)
        return result

    return load


def _local_folder(given: dict[str, Any]) -> Path | None:
    """The folder on this machine that a loader was called with, if there is one."""
    source = given.get("model_id", given.get("peft_model_id"))
    if not isinstance(source, (str, os.PathLike)):
        return None
    folder = Path(source, given.get("kwargs", {}).get("subfolder") or "")
    return folder if folder.is_dir() else None


def _may_be_spiel(given: dict[str, Any], folder: Path | None) -> bool:
    """Whether a loader was called for a SpIEL adapter; True for an adapter that has to be downloaded first."""
    config = given.get("config") or given.get("peft_config")
    if folder is not None and (folder / "adapter_config.json").is_file():
        # Read in any case: PEFT reads it as well.
        kind = config_object(folder / "adapter_config.json").get("peft_type")
        kind = config.peft_type if isinstance(config, PeftConfig) else kind
    elif config is not None:
        kind = config.get("peft_type") if isinstance(config, dict) else getattr(config, "peft_type", None)
    else:
        return True
    return getattr(kind, "value", kind) == "SPIEL"


def _max_deltas(folder: Path | None) -> int | None:
    """The most deltas that the adapter of a folder may get. Raises a ValueError if the file is damaged."""
    path = None if folder is None else tensors_file(folder)
    if path is None:
        return None
    _dtypes_of_file(path)
    return _ROOM * (path.stat().st_size + _SMALL) // _BYTES_PER_DELTA


def _dtypes_of_file(path: Path) -> dict[str, torch.dtype | None]:
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else load_adapter_pickle(path)
    return {key: tensor.dtype for key, tensor in tensors.items()}


@contextmanager
def _file_checked(model: nn.Module, adapter_name: str, check: Check) -> Iterator[None]:
    """Check the file that transformers loads, which goes past PEFT's loader.

    transformers calls this method of the model between adding the adapter and reading its tensors.
    """
    original = getattr(model, "_load_pretrained_model", None)
    if not isinstance(model, PeftAdapterMixin) or original is None:
        yield
        return

    def load(*args: Any, **kwargs: Any) -> Any:
        config = model.peft_config[adapter_name]
        if isinstance(config, SpIELConfig):
            dtypes = {key: tensor.dtype for key, tensor in (kwargs.get("state_dict") or {}).items()}
            for file in map(Path, kwargs.get("checkpoint_files") or ()):
                dtypes.update(_dtypes_of_file(file))
            known = full_modules(model, adapter_name).values()
            refuse_unannounced(model, config, adapter_name, dtypes, {*known, *(f"{PREFIX}{key}" for key in known)})
            check(model, adapter_name, dtypes)
        return original(*args, **kwargs)

    vars(model)["_load_pretrained_model"] = load
    try:
        yield
    finally:
        vars(model).pop("_load_pretrained_model", None)


def _check_loaded(model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter whose tensors are not finite in the dtype that they have now.

    Raises:
        ValueError: names the tensor.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, SparseDelta) and module.run.adapter_name == adapter_name:
            if module.run.refused is not None:
                raise ValueError(module.run.refused)
            tensors[f"{module.module_name}{MARKER}values"] = module.values
        elif isinstance(module, AuxiliaryTrainingWrapper):
            own = dict(module.named_parameters())
            stored = module.adapter_state_dict_load_map(adapter_name)
            tensors.update({f"{name}.{key}": own[live] for key, live in stored.items() if live in own})
    for key in not_finite(tensors):
        dtype = tensors[key].dtype
        raise ValueError(f"{REFUSED}: tensor {key!r} is not finite in {dtype}, the dtype that it gets here")
