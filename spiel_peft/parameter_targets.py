"""Bare parameters as targets (`target_parameters`): finding them in a model, and giving them their deltas."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn

from .base_weight import FLOAT_DTYPES, PARAMETER, BaseInfo
from .config import SpIELConfig
from .layers import SpIELParameter, SpIELParameters
from .targets import bypassed_by


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
