"""Saves and loads adapters: chooses an adapter file's tensors, and refuses a bad file before the model changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .adapter_format import (
    MARKER,
    NOT_FINITE,
    check_cast,
    check_indices_and_values,
    check_training_state,
    not_finite,
    overflows,
    split_file_key,
)
from .checks import first_of, listed
from .config import SpIELConfig
from .delta import SparseDelta
from .files.adapter_file import PREFIX
from .files.loading import CHECKPOINTED, REFUSED, clean_name, full_modules, refuse_unannounced, whole_or_not
from .layers import SpIELLayer
from .state import STATE_KEYS
from .targets import check_unmerged

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
        deltas: the model's deltas by module name. The file must not have other modules. Modules that it lacks are left
            to PEFT, which reports missing keys.

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
            raise ValueError(f"{REFUSED}: tensor '{key}' names an adapter")
    for module, entries in modules.items():
        problem = _check_module(entries, deltas.get(module))
        if problem is not None:
            name, what = problem
            raise ValueError(f"{REFUSED}: tensor '{module}{MARKER}{name}' {what}")
    _refuse_other_modules(set(modules), deltas)


def check_header(model: nn.Module, adapter_name: str, dtypes: Mapping[str, torch.dtype | None]) -> None:
    """Refuse a file that transformers is about to load, by what it says of its tensors.

    transformers assigns tensor after tensor, and casts each before. `SparseDelta` checks their entries then.

    Args:
        model: the model, with the new adapter.
        adapter_name: name of the adapter.
        dtypes: of the file's tensors, by key; None for one that this package cannot compute with.

    Raises:
        ValueError: a tensor is of no module of the adapter, alone, or not of the kind of numbers that it has to be.
    """
    modules = {key: split_file_key(key.removeprefix(PREFIX)) for key in dtypes}
    own = _deltas_of(model, adapter_name)
    _refuse_other_modules({parts[0] for parts in modules.values() if parts is not None}, own)
    for key, (module, name) in ((key, parts) for key, parts in modules.items() if parts is not None):
        other = {"indices": "values", "values": "indices"}.get(name)
        if other is None:
            continue
        if f"{key.removesuffix(name)}{other}" not in dtypes:
            raise ValueError(f"{REFUSED}: tensor '{module}{MARKER}{other}' is missing, while its {name} are there")
        dtype = dtypes[key]
        if dtype is None or dtype.is_complex or dtype.is_floating_point != (name == "values"):
            kind = "a floating" if name == "values" else "an integer"
            raise ValueError(f"{REFUSED}: tensor '{module}{MARKER}{name}' must have {kind} dtype, got {dtype}")


def _refuse_other_modules(modules: set[str], deltas: Mapping[str, SparseDelta]) -> None:
    others = sorted(modules - set(deltas))
    if others:
        raise ValueError(
            f"{REFUSED}: it is of a run that trained modules which this adapter lacks ({first_of(others)}); load it "
            "into the model and with the target_modules that it was made with"
        )


def _deltas_of(model: nn.Module, adapter_name: str) -> dict[str, SparseDelta]:
    """The deltas of an adapter by the names that their modules have in files."""
    return {
        clean_name(name).removeprefix(PREFIX): layer.spiel_delta[adapter_name]
        for name, layer in model.named_modules()
        if isinstance(layer, SpIELLayer) and adapter_name in layer.spiel_delta
    }


def _check_module(entries: dict[str, Tensor], delta: SparseDelta | None) -> tuple[str, str] | None:
    """The name of a bad tensor among the entries of one module and what is wrong with it, or None."""
    # PEFT's "size mismatch" (see `size_mismatches`) reports a file of another budget, which is not damaged.
    indices = entries.get("indices")
    fits = delta is not None and indices is not None and delta.k == indices.numel()
    for name, tensor in entries.items():
        # Of a sparse or expanded tensor that does not fit, a check would need more memory than the file has bytes.
        if not fits and (tensor.layout != torch.strided or (tensor.numel() > 1 and 0 in tensor.stride())):
            return name, f"is not stored in full: {tuple(tensor.shape)}, strides or layout that repeat entries"
    problem = check_indices_and_values(entries, delta.numel if fits else None)
    if problem is None and fits:
        problem = check_cast(entries, delta.values.dtype)
    if problem is None and fits:
        problem = check_training_state(entries, delta.settings)
        if problem is None:
            delta.note_checked(entries)
    return problem


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
    for name, module in model.named_modules():
        for key, tensor in module.named_parameters() if isinstance(module, AuxiliaryTrainingWrapper) else ():
            found = state_dict.get(f"{prefix}{name}.{key}")
            if "original_module" in key or ".base_layer." in key or found is None:
                continue
            size = _size_mismatch(f"{prefix}{name}.{key}", found, tensor)
            what = None if size is not None else _not_finite(found, tensor, is_parameter=True)
            problems += [size] if size is not None else [f"{prefix}{name}.{key} {what}"] if what is not None else []
    if problems:
        for delta in deltas.values():
            delta.note_checked({})
        raise RuntimeError("Error(s) in loading SpIEL deltas, nothing was loaded:\n\t" + "\n\t".join(problems))


def check_next_load(model: nn.Module, on_refusal: Callable[[], None]) -> None:
    """Make the next `load_state_dict` of a model, which loads an adapter file, load all of it or nothing.

    PyTorch copies the tensors that fit and reports the others at the end. The check runs after PEFT's
    `ignore_mismatched_sizes` has taken out the tensors that are not to be loaded.

    Args:
        model: the model whose next `load_state_dict` is checked.
        on_refusal: called before an error is raised.
    """
    original = model.load_state_dict

    def load_state_dict(state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        vars(model).pop("load_state_dict", None)
        live = model.state_dict()
        pairs = {key: (state_dict[key], live[key]) for key in live if key in state_dict}
        try:
            problems = [found for key, pair in pairs.items() if (found := _size_mismatch(key, *pair)) is not None]
            if problems:
                problems.insert(0, "Error(s) in loading a SpIEL adapter, nothing was loaded:")
                raise RuntimeError("\n\t".join(problems))
            parameters = {name for name, _ in model.named_parameters()}
            for key, pair in pairs.items():
                what = None if MARKER in key else _not_finite(*pair, key in parameters)
                if what is not None:
                    raise ValueError(f"{REFUSED}: tensor {key!r} {what}")
            with whole_or_not(model) as loading:
                loading.keep(tensor for _, tensor in pairs.values())
                return original(state_dict, *args, **kwargs)
        except BaseException:
            on_refusal()
            raise

    vars(model)["load_state_dict"] = load_state_dict


def _size_mismatch(key: str, found: Any, own: Any) -> str | None:
    """PEFT's sentence about a tensor of a file whose shape differs from that in the model, else None."""
    if not (isinstance(found, Tensor) and isinstance(own, Tensor)) or found.shape == own.shape:
        return None
    return (
        f"size mismatch for {key}: the checkpoint has shape {tuple(found.shape)}, the model {tuple(own.shape)}"
        f"{_ANOTHER_BUDGET if MARKER in key else ''}; load it with the config it was saved with"
    )


def _not_finite(found: Any, own: Any, is_parameter: bool) -> str | None:
    """A phrase if a tensor is not finite in the dtype that it is loaded as, else None. Buffers may hold infinities."""
    if not (isinstance(found, Tensor) and isinstance(own, Tensor)) or found.is_meta:
        return None
    if overflows(found, own.dtype):
        return f"has values that are too large for {own.dtype}, the dtype that the model has there"
    return NOT_FINITE if is_parameter and not_finite({"": found}) else None


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
        ValueError: what was trained is NaN or infinite; names it. A good checkpoint must not make way for it.
    """
    out = dict(found)
    out.update(checkpointed_entries(model, state_dict, biases=config.bias == "spiel_only"))
    _refuse_ruined(adapter_name, {**out, **_full_parameters(model, adapter_name, state_dict)})
    if not config.inference_mode:
        out.update(_training_entries(model, adapter_name))
    return own_names(model, out)


def _full_parameters(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT adds to an adapter file besides deltas and biases: modules in full, without buffers, and tokens."""
    parameters = {name for name, _ in model.named_parameters()}
    stored = full_modules(model, adapter_name)
    return {stored[key]: state_dict[key] for key in stored.keys() & parameters & state_dict.keys()}


def _refuse_ruined(adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    names = {key: key.partition(MARKER)[0].removeprefix(PREFIX) for key in tensors}
    ruined = [names[key] for key in not_finite(tensors)]
    if ruined:
        raise ValueError(
            f"Adapter {adapter_name!r} is not saved: {len(ruined)} of its {len(set(names.values()))} trained tensors "
            f"are NaN or infinite ({listed(ruined)}). Resume from the last checkpoint."
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
        ValueError: the file is damaged or of another run.
    """

    def __init__(
        self, model: nn.Module, config: SpIELConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
    ) -> None:
        check_unmerged(model, adapter_name, "loaded")
        self.model, self.adapter_name = model, adapter_name
        deltas = _deltas_of(model, adapter_name)
        tensors = drop_orphans({k.replace("._orig_mod.", "."): v for k, v in state_dict.items()})
        if config.inference_mode:
            tensors = {k: v for k, v in tensors.items() if k.rpartition(".")[2] not in STATE_KEYS}
        self.tensors = tensors
        self._deltas = list(deltas.values())
        try:
            check_adapter_tensors({k.removeprefix(PREFIX): v for k, v in tensors.items()}, deltas)
            refuse_unannounced(model, config, adapter_name, tensors, full_modules(model, adapter_name))
        except ValueError:
            self._forget_checks()
            raise

    def _forget_checks(self) -> None:
        for delta in self._deltas:
            delta.note_checked({})

    def named(self, remapped: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the training state to the tensors that PEFT has renamed for this model, and have their sizes checked."""
        check_next_load(self.model, self._forget_checks)
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
