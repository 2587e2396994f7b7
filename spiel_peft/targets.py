"""The targets of an adapter in a model: modules and bare parameters."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from .adapter_format import split_file_key
from .checks import first_of
from .config import SpIELConfig, names_module
from .layers import SpIELLayer, SpIELParameter, SpIELParameters
from .weights.base_weight import FLOAT_DTYPES, PARAMETER, BaseInfo, memory_of

# Continues the name of a target whose parent is `bypassed_by`.
BYPASSED = (
    "belongs to nn.TransformerEncoderLayer, whose inference path reads weights without calling the layer; call "
    "torch.backends.mha.set_fastpath_enabled(False) first"
)


def bypassed_by(parent: nn.Module) -> bool:
    """Whether a module may compute with the weights of its children without calling them."""
    return isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled()


def modules_of(state_dict: dict[str, Tensor] | None) -> tuple[set[str] | None, dict[str, int]]:
    """The modules of a state dict from which PEFT injects an adapter.

    Returns:
        The names of the modules, None without a state dict; and the number of deltas of each SpIEL module.
    """
    if state_dict is None:
        return None, {}
    names: set[str] = set()
    counts: dict[str, int] = {}
    for key, tensor in state_dict.items():
        # PEFT finds the module names in a state dict in the same way.
        name = key.rsplit(".spiel_", 1)[0].removeprefix("_orig_mod.")
        names.add(name)
        parts = split_file_key(key)
        if parts is not None and parts[1] == "indices":
            counts[name] = tensor.numel()
    return names, counts


def shared_weights(model: nn.Module, targets: set[str]) -> dict[str, tuple[str, ...]]:
    """The targets whose weight is tied to other modules, each with the names of those modules.

    A weight counts as tied to every parameter and buffer of the model that lies in the same memory, such as a view; one
    that is not called "weight" is named in full.
    """
    users: list[tuple[int, int, int, str]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        path = name.replace(".base_layer", "")
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                users.append((*memory_of(tensor), path if own == "weight" else f"{path}.{own}"))
    users.sort()
    shared: dict[str, set[str]] = {}
    for number, (memory, _, end, name) in enumerate(users):
        following = number + 1
        while following < len(users) and users[following][0] == memory and users[following][1] < end:
            other = users[following][3]
            following += 1
            shared.setdefault(name, set()).add(other)
            shared.setdefault(other, set()).add(name)
    others = {name: tuple(sorted(names - {name})) for name, names in shared.items() if name in targets}
    return {name: names for name, names in others.items() if names}


def refuse_missing_rows(model: nn.Module, config: SpIELConfig) -> None:
    """Raise a ValueError if `trainable_token_indices` names a row that an embedding of the model does not have."""
    chosen = config.trainable_token_indices
    if not chosen:
        return
    if isinstance(chosen, dict):
        modules = [(name.removesuffix(".base_layer"), module) for name, module in model.named_modules()]
        wanted = [(name, m, rows) for name, m in modules for key, rows in chosen.items() if names_module(key, name)]
    else:
        wanted = [("the input embedding", _input_embedding(model), chosen)]
    for name, module, rows in wanted:
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        size = getattr(base, "num_embeddings", None)
        if isinstance(size, int) and rows and max(rows) >= size:
            raise ValueError(
                f"`trainable_token_indices` names row {max(rows)} of {name}, which has {size} rows. Resize the "
                "embedding to the tokenizer first, or name rows that are there."
            )


def _input_embedding(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def untie_weights(model: nn.Module) -> None:
    """Give all tied weights of a transformers model parameters of their own if merging has changed one of them.

    A config says whether all embeddings of a model are tied or none is. In a model that ties three or more (BART,
    Marian), the unchanged ones must not depend on being tied either, or they are missing once the model is saved.
    """
    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    if all(_parameter(model, target) is _parameter(model, source) for target, source in pairs.items()):
        return
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    seen: set[int] = set()
    for full_name in dict.fromkeys([*pairs.values(), *pairs]):
        parameter = _parameter(model, full_name)
        if parameter is not None and id(parameter) in seen:
            module, _, name = full_name.rpartition(".")
            own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            model.get_submodule(module)._parameters[name] = own
        seen.add(id(parameter))


def _parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    module, _, name = name.rpartition(".")
    return model.get_submodule(module)._parameters.get(name)


def warn_about_fused_experts(model: nn.Module) -> None:
    """Warn about mixture-of-experts weights fused into 3-D parameters, which `target_modules` cannot reach."""
    missed = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, BaseTunerLayer)) or ".base_layer" in name:
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{parameter_name}"
            if parameter.dim() == 3 and "expert" in full.lower():
                missed.append(full)
    if missed:
        suffixes = sorted({".".join(name.split(".")[-2:]) for name in missed})
        warnings.warn(
            f"These fused expert parameters are not modules, so target_modules cannot reach them and they stay frozen: "
            f"{first_of(missed, 4)}. To adapt them, name them: target_parameters={suffixes[:6]}.",
            stacklevel=2,
        )


@dataclass(frozen=True)
class BareParameter:
    """A parameter of a model and the module that holds it: a possible entry of `target_parameters`.

    Attributes:
        path: name of the module in the model without adapters.
        name: name of the parameter in the module.
        module: the module itself, not an adapted layer around it.
        parent: the module that holds `module`; None if `module` is the model.
        around: the outermost adapted layer around the module; None if there is none.
    """

    path: str
    name: str
    module: nn.Module
    parent: nn.Module | None
    around: nn.Module | None

    @property
    def full_name(self) -> str:
        """Name of the parameter in the model without adapters."""
        return f"{self.path}.{self.name}" if self.path else self.name

    @property
    def host(self) -> SpIELParameters | None:
        """The wrapper that carries deltas of the module's parameters; None if there is none."""
        return self.around if isinstance(self.around, SpIELParameters) else None


def bare_parameters(model: nn.Module) -> Iterator[BareParameter]:
    """All parameters of a model that do not belong to adapters, with their names in the model without adapters."""
    yield from _walk(model, "", None, None)


def _walk(module: nn.Module, path: str, parent: nn.Module | None, around: nn.Module | None) -> Iterator[BareParameter]:
    if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        # Everything else in such a layer belongs to its adapters.
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
    """Move the keys of a `num_deltas` dict that name parameters from `target_modules` to `target_parameters`.

    The configs of combined and extracted adapters list modules and parameters together.
    """
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
    """The parameters that `target_parameters` names, in the model's order.

    Args:
        model: the model without the adapter.
        config: the adapter's config.
        targets: full names of the modules that `target_modules` matches.

    Returns:
        The parameters that can be adapted, with their descriptions, by full name; and for each other one a phrase that
        names it and says why it cannot be adapted.

    Raises:
        ValueError: an entry of `target_parameters` names no parameter of the model.
    """
    everything = list(bare_parameters(model)) if config.target_parameters else []
    wanted = [parameter for parameter in everything if config.names_parameter(parameter.full_name)]
    names = [parameter.full_name for parameter in wanted]
    unknown = [target for target in config.target_parameters if not any(names_module(target, name) for name in names)]
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
    found, problems = {}, []
    for parameter in wanted:
        info = _inspect(parameter, config, targets, wanted)
        others = [p.full_name for p in everything if p.full_name != parameter.full_name and _overlap(p, parameter)]
        if not isinstance(info, str) and others:
            info = f"is tied to {others[0]}; untie them, or adapt the module of that name (ensure_weight_tying)"
        if isinstance(info, str):
            kind = type(parameter.module)
            problems.append(f"{parameter.full_name} ({kind.__module__}.{kind.__qualname__}) {info}")
        else:
            found[parameter.full_name] = (parameter, info)
    return found, problems


def _overlap(one: BareParameter, other: BareParameter) -> bool:
    """Whether two parameters lie in the same memory."""
    tensors = (one.module._parameters.get(one.name), other.module._parameters.get(other.name))
    if tensors[0] is None or tensors[1] is None:  # computed by parametrizations
        return False
    (memory, begin, end), (other_memory, other_begin, other_end) = map(memory_of, tensors)
    return memory == other_memory and begin < other_end and other_begin < end


def _inspect(
    parameter: BareParameter, config: SpIELConfig, targets: set[str], wanted: list[BareParameter]
) -> BaseInfo | str:
    """Describe a parameter that can be adapted in this model, or say in a phrase why it cannot."""
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
        return BYPASSED
    return inspect_parameter(parameter.module, parameter.name)


def inspect_parameter(module: nn.Module, name: str) -> BaseInfo | str:
    """Describe a bare parameter that can carry deltas, or say in a phrase why it cannot.

    Args:
        module: the module that holds the parameter and computes with it.
        name: name of the parameter in the module.
    """
    if name in getattr(module, "parametrizations", ()):
        return "is computed by a parametrization (4-bit experts are); load the model unquantized"
    parameter = module._parameters[name]
    if parameter.dtype not in FLOAT_DTYPES or resolve_quantization_backend(module) is not None:
        return (
            f"is stored as {parameter.dtype}, but only unquantized floating-point parameters can be adapted; load the "
            "model unquantized"
        )
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
    """The layer that carries the deltas of a parameter; it is put into the model if it is not there yet."""
    host = model.get_submodule(parameter.path)
    if not isinstance(host, SpIELParameters):
        host = SpIELParameters(host)
        put_module(model, parameter.path, host)
    part = host._modules.get(parameter.name)
    if part is None:
        part = SpIELParameter(host, parameter.name, info, parameter.full_name)
        part.train(host.training)
        host._modules[parameter.name] = part  # `add_module` refuses "weight", which PEFT's layers have a property for
    return part


def remove_empty_hosts(model: nn.Module) -> None:
    """Remove the wrappers of bare parameters that no longer have deltas."""
    for name, host in list(model.named_modules()):
        if not isinstance(host, SpIELParameters):
            continue
        for part in host.parts():
            if not part.spiel_delta:
                part.undo_interrupted()
                del host._modules[part.parameter_name]
        if not host.parts():
            put_module(model, name, host.base_layer)


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module with this full name in a model."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def check_unmerged(model: nn.Module, adapter_name: str, what: str) -> None:
    """Raise a ValueError if any adapter is merged.

    Args:
        model: the adapted model.
        adapter_name: the adapter that cannot be changed then, for the error.
        what: the change as a participle, such as "added", for the error.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, SpIELLayer)]
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise ValueError(
            f"Adapter {adapter_name!r} cannot be {what} while {merged} are merged into the base weights; call "
            "unmerge_adapter() first"
        )
