"""What can be read off a model about the modules that an adapter targets."""

from __future__ import annotations

import warnings

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .tensor_checks import split_file_key


def bypassed_by(parent: nn.Module) -> bool:
    """Whether a parent module may compute with its children's weights without calling them."""
    return isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled()


def names_module(target: str, key: str) -> bool:
    """Whether an entry of `target_modules` names the module `key`."""
    return key == target or key.endswith("." + target)


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
