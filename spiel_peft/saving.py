"""Saves and loads adapters: chooses an adapter file's tensors, and refuses a bad file before the model changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .adapter_format import MARKER, check_indices_and_values, check_training_state, split_file_key
from .checks import first_of, listed
from .config import SpIELConfig
from .delta import SparseDelta
from .files.adapter_file import PREFIX
from .layers import SpIELLayer, SpIELParameter
from .state import STATE_KEYS
from .targets import check_unmerged, put_module, remove_empty_hosts

# PyTorch's wrapper for activation checkpoints adds this to the names of modules, but not to the keys of state dicts.
CHECKPOINTED = "_checkpoint_wrapped_module."
_ANOTHER_BUDGET = ", another budget (r, density or num_deltas)"


def checkpointed_entries(model: nn.Module, state_dict: Mapping[str, Tensor], biases: bool) -> dict[str, Tensor]:
    """The deltas of modules under activation checkpoints, which PEFT misses: their names and state dict keys differ.

    Args:
        model: the adapted model.
        state_dict: state dict of the model, without other adapters.
        biases: whether to add the biases of these modules.
    """
    paths = [name for name, module in model.named_modules() if isinstance(module, SparseDelta) and CHECKPOINTED in name]
    keys = []
    for path in (path.replace(CHECKPOINTED, "") for path in paths):
        keys += [f"{path}.indices", f"{path}.values"]
        if biases:
            keys.append(f"{path.rpartition(MARKER)[0]}.base_layer.bias")
    return {key: state_dict[key] for key in keys if key in state_dict}


def own_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors to the names that their modules have in the base model.

    A module that has adapters of another method too, such as LoRA, has a longer name in the adapted model.
    """
    within = [
        f"{name}.base_layer{MARKER}" for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    ]
    longer = {prefix: prefix.replace(f".base_layer{MARKER}", MARKER) for prefix in within}
    out = {}
    for key, tensor in tensors.items():
        prefix = key[: key.rfind(MARKER) + len(MARKER)] if MARKER in key else ""
        out[longer.get(prefix, prefix) + key[len(prefix) :]] = tensor
    return out


def drop_orphans(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the tensors of modules whose values are not in the file.

    PEFT reports the missing keys. Loading indices without values would go unnoticed.
    """
    kept = {}
    for key, tensor in tensors.items():
        parts = split_file_key(key)
        if parts is None or f"{parts[0]}{MARKER}values" in tensors:
            kept[key] = tensor
    return kept


def check_adapter_tensors(tensors: Mapping[str, Tensor], deltas: Mapping[str, SparseDelta]) -> None:
    """Refuse a damaged or malicious adapter file, and training state that does not fit the model.

    Tensors that fit are noted at their deltas, so that loading them does not check them again.

    Args:
        tensors: the tensors of the file: ``<module>.spiel_delta.values``, ``.indices`` and optional training state.
        deltas: the model's deltas by module name. Modules of the file that the model lacks are checked as far as that
            is possible without a weight; a file with training state must not have any.

    Raises:
        ValueError: names the first bad tensor and what is wrong with it.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parts = split_file_key(key)
        if parts is not None:
            modules.setdefault(parts[0], {})[parts[1]] = tensor
        elif MARKER in key:
            # PEFT would load such a tensor into the adapter that its key names.
            raise ValueError(f"The adapter file is refused, nothing was loaded: tensor '{key}' names an adapter")
    for module, entries in modules.items():
        problem = _check_module(entries, deltas.get(module))
        if problem is not None:
            name, what = problem
            raise ValueError(f"The adapter file is refused, nothing was loaded: tensor '{module}{MARKER}{name}' {what}")
    if any(name in entries for entries in modules.values() for name in STATE_KEYS):
        _refuse_more_modules(sorted(set(modules) - set(deltas)))


def _check_module(entries: dict[str, Tensor], delta: SparseDelta | None) -> tuple[str, str] | None:
    """The name of a bad tensor among the entries of one module and what is wrong with it, or None."""
    # PEFT's "size mismatch" (see `size_mismatches`) reports a file of another budget, which is not damaged.
    indices = entries.get("indices")
    fits = delta is not None and indices is not None and delta.k == indices.numel()
    problem = check_indices_and_values(entries, delta.numel if fits else None)
    if problem is None and fits:
        problem = check_training_state(entries, delta.settings)
        if problem is None:
            delta.note_checked(entries)
    return problem


def _refuse_more_modules(names: list[str]) -> None:
    """Raise a ValueError if a file with training state has modules that the adapter lacks.

    PEFT reports modules that the file lacks as missing keys, and resuming refuses them.
    """
    if names:
        raise ValueError(
            "The adapter file is refused, nothing was loaded: it is of a run that trained modules which this adapter "
            f"lacks ({first_of(names)}); resume on the model and with the target_modules that the checkpoint was made "
            "with"
        )


def check_live_state_dict(model: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Refuse a state dict as a whole before `load_state_dict` copies its first tensor.

    PyTorch copies the tensors that fit and reports the others at the end, which would leave deltas of two runs in one
    model.

    Args:
        model: a module that contains deltas.
        state_dict: a state dict whose keys are those of `model.state_dict()` after `prefix`. Keys of other modules are
            ignored. Missing keys are left to PyTorch, which alone knows whether `strict` was given.
        prefix: beginning of the model's keys.

    Raises:
        RuntimeError: lists what does not fit.
    """
    problems: list[str] = []
    deltas = {name: module for name, module in model.named_modules() if isinstance(module, SparseDelta)}
    for name, delta in deltas.items():
        problems += delta.problems_with(state_dict, f"{prefix}{name}.")
    if problems:
        for delta in deltas.values():
            delta.note_checked({})
        raise RuntimeError("Error(s) in loading SpIEL deltas, nothing was loaded:\n\t" + "\n\t".join(problems))


class SizeCheck:
    """A hook for one call that raises PEFT's "size mismatch" before `load_state_dict` copies its first tensor.

    PyTorch copies the tensors that fit and reports the others at the end. This hook changes nothing unless all tensors
    fit. It runs after PEFT's `ignore_mismatched_sizes` has taken out the tensors that are not to be loaded.

    Args:
        model: the model whose next `load_state_dict` is checked.
        on_mismatch: called before the error is raised.
    """

    def __init__(self, model: nn.Module, on_mismatch: Callable[[], None]) -> None:
        self.on_mismatch = on_mismatch
        self.handle = model.register_load_state_dict_pre_hook(self)

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        self.handle.remove()
        problems = size_mismatches(module, state_dict, prefix)
        if problems:
            self.on_mismatch()
            raise RuntimeError("Error(s) in loading a SpIEL adapter, nothing was loaded:\n\t" + "\n\t".join(problems))


def size_mismatches(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str = "") -> list[str]:
    """A sentence for every tensor of `state_dict` whose shape differs from that in the module."""
    problems = []
    for name, tensor in module.state_dict().items():
        found = state_dict.get(prefix + name)
        if isinstance(found, Tensor) and isinstance(tensor, Tensor) and found.shape != tensor.shape:
            problems.append(
                f"size mismatch for {prefix}{name}: the checkpoint has shape {tuple(found.shape)}, the model "
                f"{tuple(tensor.shape)}{_ANOTHER_BUDGET if MARKER in name else ''}; load it with the config it was "
                "saved with"
            )
    return problems


def saved_entries(
    model: nn.Module,
    config: SpIELConfig,
    adapter_name: str,
    state_dict: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The tensors of an adapter file, by key.

    Args:
        model: the adapted model, with the module names that `state_dict` has.
        config: config of the adapter; with `inference_mode` the file has no training state.
        adapter_name: name of the adapter.
        state_dict: state dict of the model, without other adapters.
        found: the tensors that PEFT has chosen from `state_dict`.

    Raises:
        ValueError: deltas are NaN or infinite; names their modules. A good checkpoint must not make way for them.
    """
    out = dict(found)
    out.update(checkpointed_entries(model, state_dict, biases=config.bias == "spiel_only"))
    _refuse_ruined_values(adapter_name, out)
    if not config.inference_mode:
        out.update(_training_entries(model, adapter_name))
    return own_names(model, out)


def _refuse_ruined_values(adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    finite = {
        key.rpartition(MARKER)[0].removeprefix(PREFIX): tensor.isfinite().all()
        for key, tensor in tensors.items()
        if MARKER in key and key.endswith("values") and isinstance(tensor, Tensor) and not tensor.is_meta
    }
    names = [name for name, sound in finite.items() if not sound]
    if names:
        raise ValueError(
            f"Adapter {adapter_name!r} is not saved: deltas of {len(names)} of {len(finite)} modules are NaN or "
            f"infinite ({listed(names)}). Resume from the last checkpoint."
        )


def _training_entries(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The training state of an adapter by key. It is not in `model.state_dict()`, whose keys must not depend on it."""
    out = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SpIELLayer) and adapter_name in layer.spiel_delta:
            for key, tensor in layer.spiel_delta[adapter_name].training_tensors().items():
                out[f"{name.replace(CHECKPOINTED, '')}{MARKER}{adapter_name}.{key}"] = tensor
    return out


class AdapterLoading:
    """Loads one adapter file, which is checked as a whole before the first tensor of the model changes.

    Args:
        model: the model, with the new and untrained adapter.
        config: config of the adapter; with `inference_mode` training state in the file is left out.
        adapter_name: name of the adapter.
        state_dict: the tensors of the file.

    Raises:
        ValueError: the file is damaged or of another run. The new adapter is removed from the model.
    """

    def __init__(
        self, model: nn.Module, config: SpIELConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
    ) -> None:
        check_unmerged(model, adapter_name, "loaded")
        self.model, self.adapter_name = model, adapter_name
        deltas = {
            name.replace("_orig_mod.", "").replace(CHECKPOINTED, "").removeprefix(PREFIX): layer.spiel_delta[
                adapter_name
            ]
            for name, layer in model.named_modules()
            if isinstance(layer, SpIELLayer) and adapter_name in layer.spiel_delta
        }
        tensors = drop_orphans({k.replace("._orig_mod.", "."): v for k, v in state_dict.items()})
        if config.inference_mode:
            tensors = {k: v for k, v in tensors.items() if k.rpartition(".")[2] not in STATE_KEYS}
        self.tensors = tensors
        self._discard_unloaded = partial(_discard_unloaded, model, config, adapter_name, list(deltas.values()))
        self._deltas = list(deltas.values())
        try:
            check_adapter_tensors({k.removeprefix(PREFIX): v for k, v in tensors.items()}, deltas)
        except ValueError:
            self._discard()
            raise

    def _discard(self) -> None:
        for delta in self._deltas:
            delta.note_checked({})
        self._discard_unloaded()

    def named(self, remapped: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the training state to the tensors that PEFT has renamed for this model, and have their sizes checked."""
        SizeCheck(self.model, self._discard)
        return _name_training_state(self.model, self.adapter_name, remapped)


def _name_training_state(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename saved training state for an adapter. PEFT renames only keys that the model's state dict has."""
    prefixed = any(name.startswith(PREFIX) for name, _ in model.named_modules())
    out = {}
    for key, tensor in state_dict.items():
        module, _, name = key.rpartition(MARKER)
        if name in STATE_KEYS:
            if not prefixed:
                module = module.removeprefix(PREFIX)
            key = f"{module}{MARKER}{adapter_name}.{name}"
        out[key] = tensor
    return out


def _discard_unloaded(model: nn.Module, config: SpIELConfig, adapter_name: str, deltas: list[SparseDelta]) -> None:
    """Remove the adapter that PEFT has added for a file that was then refused.

    The adapter is kept if it is the only one of the model, was not made for a file, or has been trained or loaded.

    Args:
        model: the adapted model.
        config: config of the adapter.
        adapter_name: name of the adapter.
        deltas: deltas of the adapter.
    """
    others = [name for name in getattr(model, "peft_config", {}) if name != adapter_name]
    fresh = all(delta.untouched for delta in deltas)
    if not (config._from_checkpoint and fresh and others and hasattr(model, "delete_adapter")):
        return
    model.delete_adapter(adapter_name)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SpIELLayer) and not isinstance(layer, SpIELParameter) and not layer.spiel_delta:
            put_module(model, name, layer.base_layer)
    remove_empty_hosts(model)
