"""The targets of an adapter in a model: modules, bare parameters, and putting a model back after a failed injection."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from .adapter_format import split_file_key
from .config import SpIELConfig
from .delta import SparseDelta
from .layers import SpIELLayer, SpIELParameter, SpIELParameters
from .weights.base_weight import FLOAT_DTYPES, PARAMETER, BaseInfo


def bypassed_by(parent: nn.Module) -> bool:
    """Whether a parent module may compute with its children's weights without calling them."""
    return isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled()


def modules_of(state_dict: dict[str, Tensor] | None) -> tuple[set[str] | None, dict[str, int]]:
    """Module names in a state dict that adapters are injected from, and how many deltas each has there."""
    if state_dict is None:
        return None, {}
    names: set[str] = set()
    counts: dict[str, int] = {}
    for key, tensor in state_dict.items():
        # The way PEFT itself reads module names off a state dict.
        name = key.rsplit(".spiel_", 1)[0].removeprefix("_orig_mod.")
        names.add(name)
        parts = split_file_key(key)
        if parts is not None and parts[1] == "indices":
            counts[name] = tensor.numel()
    return names, counts


def shared_weights(model: nn.Module, targets: set[str]) -> dict[str, tuple[str, ...]]:
    """For every target whose weight other modules use too: the names of those modules."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name.replace(".base_layer", ""))
    shared = {}
    for names in owners.values():
        for name in targets & set(names) if len(set(names)) > 1 else ():
            shared[name] = tuple(sorted(set(names) - {name}))
    return shared


def warn_about_fused_experts(model: nn.Module) -> None:
    """Mixture-of-experts weights fused into one 3-D parameter are out of `target_modules`' reach: say so."""
    missed = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, BaseTunerLayer)) or ".base_layer" in name:
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{parameter_name}"
            if parameter.dim() == 3 and "expert" in full.lower():
                missed.append(full)
    if missed:
        shown = ", ".join(missed[:4]) + (f" and {len(missed) - 4} more" if len(missed) > 4 else "")
        suffixes = sorted({".".join(name.split(".")[-2:]) for name in missed})
        warnings.warn(
            f"These fused expert parameters are not modules, so target_modules cannot reach them and they stay frozen: "
            f"{shown}. To adapt them, name them: target_parameters={suffixes[:6]}.",
            stacklevel=2,
        )


# Bare parameters as targets (`target_parameters`): finding them in a model, and giving them their deltas.


@dataclass(frozen=True)
class BareParameter:
    """A parameter of a model, by the module that holds it.

    Attributes:
        path: of that module in the model, without what adapters put in between.
        name: of the parameter in it.
        module: that module; for one that has adapters already, what they are wrapped around.
        parent: the module that holds that one, None if that is the model itself.
        around: the adapters that it has, or that it lies within.
    """

    path: str
    name: str
    module: nn.Module
    parent: nn.Module | None
    around: nn.Module | None

    @property
    def full_name(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name

    @property
    def host(self) -> SpIELParameters | None:
        return self.around if isinstance(self.around, SpIELParameters) else None


def bare_parameters(model: nn.Module) -> Iterator[BareParameter]:
    """All parameters of a model but those of adapters, with the names that they had without adapters."""
    yield from _walk(model, "", None, None)


def _walk(module: nn.Module, path: str, parent: nn.Module | None, around: nn.Module | None) -> Iterator[BareParameter]:
    if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        # Whatever else there is in such a layer belongs to its adapters.
        base = module._modules.get("base_layer") or module._modules.get("original_module")
        if base is not None:
            yield from _walk(base, path, parent, around or module)
        return
    computed = list(getattr(module, "parametrizations", ()))
    for name in [name for name, parameter in module._parameters.items() if parameter is not None] + computed:
        yield BareParameter(path, name, module, parent, around)
    for name, child in module.named_children():
        if name != "parametrizations" or not computed:
            yield from _walk(child, f"{path}.{name}" if path else name, module, around)


def name_listed_parameters(config: SpIELConfig, model: nn.Module) -> None:
    """Sort out which keys of a `num_deltas` dict are parameters: files that were combined or extracted do not say."""
    if not isinstance(config.num_deltas, dict):
        return
    modules = {
        name.replace(".base_layer", "") for name, m in model.named_modules() if not isinstance(m, SpIELParameter)
    }
    unknown = set(config.num_deltas) - modules
    found = {parameter.full_name for parameter in bare_parameters(model)} & unknown if unknown else set()
    if found:
        config.target_parameters = sorted({*config.target_parameters, *found})
        config.target_modules = {n for n in config.num_deltas if not config.names_parameter(n)}


def find_target_parameters(
    model: nn.Module, config: SpIELConfig, targets: set[str]
) -> tuple[dict[str, tuple[BareParameter, BaseInfo]], list[str]]:
    """The parameters that `target_parameters` names, in the model's order, and what is wrong with some of them.

    Args:
        model: without the adapter.
        targets: full names of the modules that `target_modules` reaches.

    Returns:
        Each parameter with its description, by full name; and for each that cannot be adapted a phrase that says why.

    Raises:
        ValueError: an entry of `target_parameters` that names nothing.
    """
    everything = list(bare_parameters(model)) if config.target_parameters else []
    wanted = [parameter for parameter in everything if config.names_parameter(parameter.full_name)]
    names = [parameter.full_name for parameter in wanted]
    unknown = [t for t in config.target_parameters if not any(n == t or n.endswith(f".{t}") for n in names)]
    if unknown:
        known = sorted(
            {
                ".".join(p.full_name.split(".")[-2:])
                for p in everything
                if p.module._parameters.get(p.name) is not None and p.module._parameters[p.name].dim() == 3
            }
        )
        raise ValueError(
            f"target_parameters names parameters that the model does not have: {unknown[:5]}; give full names or "
            f"suffixes of model.named_parameters(){f', such as {known[:4]}' if known else ''}"
        )
    users: dict[int, list[str]] = {}
    for parameter in everything:
        users.setdefault(id(parameter.module._parameters.get(parameter.name)), []).append(parameter.full_name)
    found, problems = {}, []
    for parameter in wanted:
        info = _inspect(parameter, config, targets, wanted)
        others = [n for n in users[id(parameter.module._parameters.get(parameter.name))] if n != parameter.full_name]
        if not isinstance(info, str) and others:
            info = f"is tied to {others[0]}; untie them, or adapt the module of that name (ensure_weight_tying)"
        if isinstance(info, str):
            kind = type(parameter.module)
            problems.append(f"{parameter.full_name} ({kind.__module__}.{kind.__qualname__}) {info}")
        else:
            found[parameter.full_name] = (parameter, info)
    return found, problems


def _inspect(
    parameter: BareParameter, config: SpIELConfig, targets: set[str], wanted: list[BareParameter]
) -> BaseInfo | str:
    path = parameter.path
    if not path or parameter.parent is None:
        return "belongs to the model itself, which cannot be wrapped; put the model into a module of your own"
    if hasattr(SpIELParameters, parameter.name) and parameter.name not in ("weight", "bias"):
        return "has a name that adapted layers use for something else; rename it"
    if parameter.around is not None and (parameter.host is None or parameter.host.base_layer is not parameter.module):
        return f"lies within a {type(parameter.around).__name__}; leave one of the two out"
    saved = config.modules_to_save or ()
    if path in targets or any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in saved):
        return "belongs to a module that target_modules or modules_to_save names too; leave one of the two out"
    inside = [name for name in {*targets, *(other.path for other in wanted)} if name.startswith(f"{path}.")]
    inside += [name for name, module in parameter.module.named_modules() if isinstance(module, BaseTunerLayer)]
    if inside:
        return f"belongs to a module that has targets inside ({min(inside)}), which it would rename; leave one out"
    if bypassed_by(parameter.parent):
        return (
            "belongs to nn.TransformerEncoderLayer, whose inference path reads weights without calling the layer; call "
            "torch.backends.mha.set_fastpath_enabled(False) first"
        )
    return inspect_parameter(parameter.module, parameter.name)


def inspect_parameter(module: nn.Module, name: str) -> BaseInfo | str:
    """Describe a bare parameter that can carry a sparse delta, or say in a phrase why it cannot.

    Args:
        module: that holds the parameter and computes with it.
        name: of the parameter in it.
    """
    if name in getattr(module, "parametrizations", ()):
        return "is computed by a parametrization (4-bit experts are); load the model unquantized"
    parameter = module._parameters[name]
    if parameter.dtype not in FLOAT_DTYPES or resolve_quantization_backend(module) is not None:
        return f"is stored as {parameter.dtype} and quantized, or no matrix of numbers; load the model unquantized"
    if isinstance(module, nn.RNNBase):
        return f"belongs to {type(module).__name__}, which reads its weights from a list of its own"
    if name == "weight" and getattr(module, "max_norm", None) is not None:
        return "belongs to an embedding with max_norm, which rewrites its weight in every forward pass"
    if name == "weight" and getattr(module, "sparse", False):
        return "belongs to an embedding whose gradients are sparse tensors; set its `sparse` to False"
    shape = tuple(parameter.shape)
    if 0 in shape or not shape:
        return f"has the shape {shape}, and no entries to choose from"
    if len(shape) == 1:
        return BaseInfo(PARAMETER, shape, 1, shape[0], None)
    return BaseInfo(PARAMETER, shape, shape[-1], shape[-2], None, experts=math.prod(shape[:-2]))


def part_of(model: nn.Module, parameter: BareParameter, info: BaseInfo) -> SpIELParameter:
    """The layer that carries the deltas of a parameter, put in place if it is not there yet."""
    host = model.get_submodule(parameter.path)
    if not isinstance(host, SpIELParameters):
        host = SpIELParameters(host)
        parent, _, child = parameter.path.rpartition(".")
        setattr(model.get_submodule(parent), child, host)
    part = host._modules.get(parameter.name)
    if part is None:
        part = SpIELParameter(host, parameter.name, info, parameter.full_name)
        part.train(host.training)
        host._modules[parameter.name] = part  # `add_module` refuses "weight", which PEFT's layers have a property for
    return part


def remove_empty_hosts(model: nn.Module) -> None:
    """Take wrappers out of a model whose parameters have no deltas any more."""
    for name, host in list(model.named_modules()):
        if not isinstance(host, SpIELParameters):
            continue
        for part in host.parts():
            if not part.spiel_delta:
                part.undo_interrupted()
                del host._modules[part.parameter_name]
        if not host.parts():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, host.base_layer)


# The modules of a model around an adapter that cannot be added: what stops it, and how they become what they were.


# What adding an adapter changes in existing layers and in PEFT's wrappers of whole modules, besides their children.
_ATTRIBUTES = ("_active_adapter", "_adapters", "shared_with", "tied_to")


class ModelStructure:
    """The modules of a model and what an injection changes in them, to be put back if it fails."""

    def __init__(self, model: nn.Module) -> None:
        self.children = [(module, dict(module._modules)) for module in model.modules()]
        self.attributes = [
            (module, {name: copy(vars(module)[name]) for name in _ATTRIBUTES if name in vars(module)})
            for module in model.modules()
            if isinstance(module, (SpIELLayer, AuxiliaryTrainingWrapper))
        ]
        self.requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.runs = [delta.run for delta in model.modules() if isinstance(delta, SparseDelta)]

    def restore(self) -> None:
        for module, children in self.children:
            module._modules.clear()
            module._modules.update(children)
        for module, attributes in self.attributes:
            vars(module).update(attributes)
        for parameter, requires_grad in self.requires_grad:
            parameter.requires_grad = requires_grad


def check_unmerged(model: nn.Module, adapter_name: str, what: str) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, SpIELLayer)]
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise ValueError(
            f"Adapter {adapter_name!r} cannot be {what} while {merged} are merged into the base weights; call "
            "unmerge_adapter() first"
        )


def discard_unloaded(model: nn.Module, config: SpIELConfig, adapter_name: str, deltas: list[SparseDelta]) -> None:
    """Remove the empty adapter that PEFT added for a file that turned out to be bad."""
    others = [name for name in getattr(model, "peft_config", {}) if name != adapter_name]
    fresh = all(delta.untouched for delta in deltas)
    if not (config._from_checkpoint and fresh and others and hasattr(model, "delete_adapter")):
        return
    model.delete_adapter(adapter_name)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SpIELLayer) and not isinstance(layer, SpIELParameter) and not layer.spiel_delta:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    remove_empty_hosts(model)
