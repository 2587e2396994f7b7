"""What changed between two checkpoints besides the weights that deltas can hold: norms, biases and the rest."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor

from .differences import Difference
from .tensors import StoredTensor
from .weights import Checkpoint

_FULL = "it has one dimension; norms_and_biases=True saves it in full"
_UNSUPPORTED = "it belongs to no layer that SpIEL can adapt"
_OTHER = "it is neither a bias nor the parameter of a norm"


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
    """Parameters of one dimension that differ; those of more that no layer can adapt are noted as left out."""
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
    leaves: dict[str, list[str]] = {}
    for name in checkpoint.stored:
        module, _, leaf = name.rpartition(".")
        leaves.setdefault(module, []).append(leaf)
    return leaves


def _is_norm(checkpoint: Checkpoint, module: str, leaves: list[str]) -> bool:
    """Whether a module's parameters all have one dimension, and one of them is called weight."""
    return "weight" in leaves and all(len(checkpoint.get(f"{module}.{leaf}").shape) == 1 for leaf in leaves)
