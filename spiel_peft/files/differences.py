"""The changes between two checkpoints of one model: of weights that can carry deltas, and of norms and biases."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import names_module
from ..weights.base_weight import LINEAR, BaseInfo, inspect_base
from .checkpoint import Checkpoint, same_contents
from .tensors import PIECE_BYTES, StoredTensor

# Differences are float32, whatever the checkpoints hold.
_ENTRIES = PIECE_BYTES // 4
Targets = Collection[str] | str | None

# Why a changed parameter is not in the adapter.
_FULL = "it has one dimension; norms_and_biases=True saves it in full"
_UNSUPPORTED = "it belongs to no layer that SpIEL can adapt"
_OTHER = "it is neither a bias nor the parameter of a norm"


@dataclass(frozen=True)
class Difference:
    """One parameter in two checkpoints, of one shape and of floating dtypes.

    Attributes:
        name: of the parameter.
        before, after: the two tensors.
    """

    name: str
    before: StoredTensor
    after: StoredTensor

    @property
    def numel(self) -> int:
        return self.before.numel

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """The float32 change ``[n]`` of the flattened parameter with its first position, piece by piece.

        Raises:
            ValueError: a change is not finite.
        """
        for start, stop in self.before.pieces(_ENTRIES):
            before, after = self.before.read(start, stop), self.after.read(start, stop)
            wide = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
            change = (after.to(wide) - before.to(wide)).float()
            low, high = change.aminmax()  # one pass, and NaN if there is one
            if not math.isfinite(low) or not math.isfinite(high):
                raise ValueError(
                    f"{self.name}: the change from {self.before.where} to {self.after.where} is not finite; one of "
                    "them holds NaN or infinite weights"
                )
            yield start, change

    def changed(self) -> bool:
        """Whether any entry differs."""
        return not same_contents(self.before, self.after) and any(bool(change.any()) for _, change in self.pieces())


def compare(base: Checkpoint, finetuned: Checkpoint, name: str) -> Difference:
    """Find a parameter in both checkpoints.

    Raises:
        ValueError: one of them lacks it, or the two do not fit together; names the files and says what to do.
    """
    remedy = f"leave it out with exclude_modules=[{name.rpartition('.')[0]!r}]"
    found = []
    for checkpoint in (base, finetuned):
        tensor = checkpoint.get(name)
        if tensor is None:
            fused = checkpoint.converted.get(name)
            how = f"holds {name} only in another layout ({fused[0]}, ...)" if fused else f"has no tensor for {name}"
            raise ValueError(f"{checkpoint.where} {how}; give two checkpoints of one architecture, or {remedy}")
        if tensor.dtype is None or not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise ValueError(
                f"{name} in {tensor.where} has dtype {tensor.dtype}: quantized or integer weights have no exact "
                f"difference; give the unquantized checkpoint, or {remedy}"
            )
        found.append(tensor)
    before, after = found
    if before.shape != after.shape:
        raise ValueError(
            f"{name} has shape {before.shape} in {before.where} but {after.shape} in {after.where}. If the vocabulary "
            "was resized, resize the base in the same way (resize_token_embeddings, save_pretrained) and give that; "
            f"or {remedy}"
        )
    return Difference(name, before, after)


def find_targets(base: Checkpoint, targets: Targets, exclude: Targets) -> dict[str, BaseInfo]:
    """The modules whose weights are compared, by full name; of tied ones only the one that owns the weight.

    Args:
        base: the checkpoint, with the names of its model if they are known.
        targets: names or name suffixes, a regex for full names, "all-linear" (linear layers but for the output
            layer), or None for every weight that SpIEL can adapt.
        exclude: names, name suffixes or a regex to leave alone.

    Raises:
        ValueError: nothing matches, or a name matches only modules that cannot be adapted.
    """
    infos, refused = adaptable_modules(base)
    linear = targets == "all-linear"
    chosen: dict[str, BaseInfo] = {}
    for module, info in infos.items():
        wanted = targets is None or (_is_inner_linear(base, module, info) if linear else _matches(targets, module))
        if wanted and not (exclude is not None and _matches(exclude, module)):
            chosen[module] = info
    if targets is not None and not linear:
        alone = [targets] if isinstance(targets, str) else sorted(targets)
        for target in alone:
            pattern = target if isinstance(targets, str) else [target]
            if any(_matches(pattern, module) for module in infos):
                continue
            known = (f"{module} {what}" for module, what in refused.items() if _matches(pattern, module))
            why = next(known, "no module has that name")
            raise ValueError(f"target_modules: {target!r} matches nothing that can be adapted in {base.where}: {why}")
    if not chosen:
        raise ValueError(f"target_modules and exclude_modules leave no weight of {base.where} to compare")
    return chosen


def adaptable_modules(base: Checkpoint) -> tuple[dict[str, BaseInfo], dict[str, str]]:
    """Describe every module that owns a weight; if the model is not known, every matrix counts as a linear layer.

    Returns:
        ``(infos, refused)``: descriptions of the modules that can carry deltas, and for the others a phrase why not.
    """
    infos: dict[str, BaseInfo] = {}
    refused: dict[str, str] = {}
    if base.names is None:
        for key, tensor in base.tensors.items():
            module, _, leaf = key.rpartition(".")
            if leaf == "weight" and module and len(tensor.shape) >= 2 and tensor.numel:
                infos[module] = BaseInfo(LINEAR, tensor.shape, math.prod(tensor.shape[1:]), tensor.shape[0], None)
        return infos, refused
    for module, layer in base.names.modules.items():
        if not module or f"{module}.weight" in base.tied or "weight" not in layer._parameters:
            continue
        info = inspect_base(layer)
        if isinstance(info, str):
            refused[module] = info
        else:
            infos[module] = info
    return infos, refused


def _is_inner_linear(base: Checkpoint, module: str, info: BaseInfo) -> bool:
    if base.names is None:
        return not names_module("lm_head", module) and "embed" not in module.rpartition(".")[2]
    head = getattr(base.names.model, "get_output_embeddings", lambda: None)()
    return info.kind in ("linear", "transposed") and base.names.modules[module] is not head


def _matches(patterns: Collection[str] | str, module: str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(names_module(pattern, module) for pattern in patterns)


@dataclass
class SmallTensors:
    """Tensors that are saved in full beside deltas.

    Attributes:
        tensors: by their key in an adapter file.
        modules: the modules among them, for ``modules_to_save``.
        has_biases: whether biases of other modules are among them.
        left_out: parameters that differ and are not among them, with the reason.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    has_biases: bool = False
    left_out: dict[str, str] = field(default_factory=dict)


def find_small_tensors(
    base: Checkpoint,
    finetuned: Checkpoint,
    adapted: Collection[str],
    adaptable: Collection[str],
    include: bool,
    as_in_base: bool,
) -> SmallTensors:
    """Collect changed norms and biases.

    Args:
        base, finetuned: two checkpoints with the same names.
        adapted: modules whose weights become deltas.
        adaptable: modules whose weights could; those that are not adapted were left out by the caller.
        include: take norms and biases in; else they are only listed as left out.
        as_in_base: take the values of the base instead of the fine-tuned ones.
    """
    found = SmallTensors()
    changed = _changed(base, finetuned, set(adaptable), found.left_out)
    if not include:
        found.left_out.update(dict.fromkeys(changed, _FULL))
        return found
    source = base if as_in_base else finetuned
    norms = {module: leaves for module, leaves in _leaves(base).items() if _is_norm(base, module, leaves)}
    changed_norms = [module for module in norms if any(f"{module}.{leaf}" in changed for leaf in norms[module])]
    # PEFT saves every module whose name ends like one it is told to save.
    found.modules = {module for module in norms if module.endswith(tuple(changed_norms))}
    for module in found.modules:
        for leaf in norms[module]:
            found.tensors[f"{module}.{leaf}"] = _full(source.get(f"{module}.{leaf}"))
    for name in changed:
        module, _, leaf = name.rpartition(".")
        if module in found.modules:
            continue
        if leaf != "bias":
            found.left_out[name] = _OTHER
            continue
        found.tensors[f"{module}.base_layer.bias" if module in adapted else name] = _full(source.get(name))
        found.has_biases = True
    return found


def _full(tensor: StoredTensor) -> Tensor:
    return tensor.read().view(tensor.shape)


def _changed(base: Checkpoint, finetuned: Checkpoint, adaptable: set[str], left_out: dict[str, str]) -> list[str]:
    """The parameters of one dimension that differ. Other parameters that differ are noted in `left_out`."""
    changed = []
    for name in base.stored:
        module, _, leaf = name.rpartition(".")
        before, after = base.get(name), finetuned.get(name)
        if leaf == "weight" and module in adaptable:
            continue
        if after is None or after.shape != before.shape:
            left_out[name] = f"{finetuned.where} has no tensor of that name and shape"
        elif before.dtype is not None and before.dtype.is_floating_point and Difference(name, before, after).changed():
            if len(before.shape) > 1:
                left_out[name] = _UNSUPPORTED
            else:
                changed.append(name)
    left_out.update({name: f"{base.where} has no such tensor" for name in finetuned.stored if base.get(name) is None})
    fused = base.converted.keys() | finetuned.converted.keys()
    left_out.update(dict.fromkeys(fused, "it is stored in another layout than the model's; nothing was compared"))
    return changed


def _leaves(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """By module: the names of its own stored parameters."""
    leaves: dict[str, list[str]] = {}
    for name in checkpoint.stored:
        module, _, leaf = name.rpartition(".")
        leaves.setdefault(module, []).append(leaf)
    return leaves


def _is_norm(checkpoint: Checkpoint, module: str, leaves: list[str]) -> bool:
    """Whether a module's parameters all have one dimension, and one of them is called weight."""
    return "weight" in leaves and all(len(checkpoint.get(f"{module}.{leaf}").shape) == 1 for leaf in leaves)
