"""What goes into an adapter's file, and the checks of a file as a whole before any tensor of a model changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .adapter_format import MARKER, check_indices_and_values, check_training_state, split_file_key
from .config import SpIELConfig
from .delta import SparseDelta
from .layers import SpIELLayer
from .state import STATE_KEYS
from .targets import check_unmerged, discard_unloaded

# What PyTorch's wrapper for activation checkpoints adds to a module's path, and leaves out of state dicts.
CHECKPOINTED = "_checkpoint_wrapped_module."
_ANOTHER_BUDGET = ", another budget (r, density or num_deltas)"


def checkpointed_entries(model: nn.Module, state_dict: Mapping[str, Tensor], biases: bool) -> dict[str, Tensor]:
    """The deltas in blocks under activation checkpoints, which PEFT overlooks as it goes by the names of modules.

    Args:
        model: with the adapter.
        state_dict: of the model, without other adapters.
        biases: with the biases of their layers.
    """
    paths = [name for name, module in model.named_modules() if isinstance(module, SparseDelta) and CHECKPOINTED in name]
    keys = []
    for path in (path.replace(CHECKPOINTED, "") for path in paths):
        keys += [f"{path}.indices", f"{path}.values"]
        if biases:
            keys.append(f"{path.rpartition(MARKER)[0]}.base_layer.bias")
    return {key: state_dict[key] for key in keys if key in state_dict}


def own_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that their modules have in the base model.

    Layers that another method's adapters were put around later (LoRA on the same module) have a longer one.
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
    """Leave out what a file has for modules whose values it lacks: PEFT reports missing keys, new indices for old
    values would go unnoticed."""
    kept = {}
    for key, tensor in tensors.items():
        parts = split_file_key(key)
        if parts is None or f"{parts[0]}{MARKER}values" in tensors:
            kept[key] = tensor
    return kept


def check_adapter_tensors(tensors: Mapping[str, Tensor], deltas: Mapping[str, SparseDelta]) -> None:
    """Refuse a damaged or hostile adapter file, and the training state of another run than the model's.

    Tensors that fit are noted at their deltas, so that loading them does not check them again.

    Args:
        tensors: the file: keys ``<module>.spiel_delta.values``, ``.indices`` and optional training state.
        deltas: the model's deltas by the same module path; modules of the file that the model lacks are checked for
            what can be known without it. A file with training state must not have others.

    Raises:
        ValueError: names the first bad tensor and what is wrong with it.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parts = split_file_key(key)
        if parts is not None:
            modules.setdefault(parts[0], {})[parts[1]] = tensor
        elif MARKER in key:
            # PEFT would load it as it stands, into whichever adapter it names.
            raise ValueError(f"The adapter file is refused, nothing was loaded: tensor '{key}' names an adapter")
    for module, entries in modules.items():
        problem = _check_module(entries, deltas.get(module))
        if problem is not None:
            name, what = problem
            raise ValueError(f"The adapter file is refused, nothing was loaded: tensor '{module}{MARKER}{name}' {what}")
    if any(name in entries for entries in modules.values() for name in STATE_KEYS):
        _refuse_more_modules(sorted(set(modules) - set(deltas)))


def _check_module(entries: dict[str, Tensor], delta: SparseDelta | None) -> tuple[str, str] | None:
    # A file of another budget is PEFT's "size mismatch" (see `size_mismatches`), not a damaged one.
    indices = entries.get("indices")
    fits = delta is not None and indices is not None and delta.k == indices.numel()
    problem = check_indices_and_values(entries, delta.numel if fits else None)
    if problem is None and fits:
        problem = check_training_state(entries, delta.settings)
        if problem is None:
            delta.note_checked(entries)
    return problem


def _refuse_more_modules(names: list[str]) -> None:
    # Modules that the file lacks are PEFT's "missing keys"; a run that is resumed with them missing is refused later.
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ValueError(
            "The adapter file is refused, nothing was loaded: it is of a run that trained modules which this adapter "
            f"lacks ({shown}); resume on the model and with the target_modules that the checkpoint was made with"
        )


def check_live_state_dict(model: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Refuse a state dict as a whole before `load_state_dict` copies its first tensor.

    torch copies what fits and reports the rest at the end, which would leave deltas of two runs in one model.

    Args:
        model: a module that contains deltas.
        state_dict: keys as in `model.state_dict()`, behind `prefix`. Keys of other modules are ignored, and missing
            ones are left to torch, which does not tell here whether they are wanted.

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
    """A one-shot hook that raises PEFT's "size mismatch" before `load_state_dict` copies its first tensor.

    torch copies what fits and reports the rest at the end; here nothing may change unless everything fits. It runs
    after PEFT's `ignore_mismatched_sizes` has taken out what the user does not want.

    Args:
        model: whose next `load_state_dict` is to be checked.
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
    """Describe every tensor of `state_dict` whose shape differs from the model's."""
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


# The part of `SpIELModel` that saves and loads: what is in an adapter file, and refusing it as a whole.


_PEFT_PREFIX = "base_model.model."


def saved_entries(
    model: nn.Module,
    config: SpIELConfig,
    adapter_name: str,
    state_dict: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The tensors of an adapter's file, by key.

    Args:
        model: with the adapter; its names are those of `state_dict`.
        config: of the adapter; one for inference is saved without training state.
        adapter_name: the adapter.
        state_dict: of the model, without other adapters.
        found: what PEFT has picked out of it.
    """
    out = dict(found)
    out.update(checkpointed_entries(model, state_dict, biases=config.bias == "spiel_only"))
    if not config.inference_mode:
        out.update(_training_entries(model, adapter_name))
    return own_names(model, out)


def _training_entries(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    out = {}
    # Not part of `model.state_dict()`: a trained and a loaded model have the same keys there.
    for name, layer in model.named_modules():
        if isinstance(layer, SpIELLayer) and adapter_name in layer.spiel_delta:
            for key, tensor in layer.spiel_delta[adapter_name].training_tensors().items():
                out[f"{name.replace(CHECKPOINTED, '')}{MARKER}{adapter_name}.{key}"] = tensor
    return out


class AdapterLoading:
    """One adapter file on its way into a model: checked as a whole before the first tensor of the model changes.

    Args:
        model: with the adapter, still untrained.
        config: of the adapter; with ``inference_mode`` training state in the file is left out.
        adapter_name: the adapter.
        state_dict: the file's tensors.

    Raises:
        ValueError: the file is damaged or of another run; the adapter is taken out of the model again.
    """

    def __init__(
        self, model: nn.Module, config: SpIELConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
    ) -> None:
        check_unmerged(model, adapter_name, "loaded")
        self.model, self.adapter_name = model, adapter_name
        deltas = {
            name.replace("_orig_mod.", "").replace(CHECKPOINTED, "").removeprefix(_PEFT_PREFIX): layer.spiel_delta[
                adapter_name
            ]
            for name, layer in model.named_modules()
            if isinstance(layer, SpIELLayer) and adapter_name in layer.spiel_delta
        }
        tensors = drop_orphans({k.replace("._orig_mod.", "."): v for k, v in state_dict.items()})
        if config.inference_mode:
            tensors = {k: v for k, v in tensors.items() if k.rpartition(".")[2] not in STATE_KEYS}
        self.tensors = tensors
        self._discard_unloaded = partial(discard_unloaded, model, config, adapter_name, list(deltas.values()))
        self._deltas = list(deltas.values())
        try:
            check_adapter_tensors({k.removeprefix(_PEFT_PREFIX): v for k, v in tensors.items()}, deltas)
        except ValueError:
            self._discard()
            raise

    def _discard(self) -> None:
        for delta in self._deltas:
            delta.note_checked({})
        self._discard_unloaded()

    def named(self, remapped: dict[str, Tensor]) -> dict[str, Tensor]:
        """What PEFT has made of `tensors` for this model, with training state; sizes are checked as it is loaded."""
        SizeCheck(self.model, self._discard)
        return _name_training_state(self.model, self.adapter_name, remapped)


def _name_training_state(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give saved training state the adapter's name; PEFT maps only keys that the model already has."""
    prefixed = any(name.startswith(_PEFT_PREFIX) for name, _ in model.named_modules())
    out = {}
    for key, tensor in state_dict.items():
        module, _, name = key.rpartition(MARKER)
        if name in STATE_KEYS:
            if not prefixed:
                module = module.removeprefix(_PEFT_PREFIX)
            key = f"{module}{MARKER}{adapter_name}.{name}"
        out[key] = tensor
    return out
