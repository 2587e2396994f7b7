"""The modules of a model around an adapter that cannot be added: what stops it, and how they become what they were."""

from __future__ import annotations

from copy import copy

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .config import SpIELConfig
from .delta import SparseDelta
from .layers import SpIELLayer, SpIELParameter
from .parameter_targets import remove_empty_hosts

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
