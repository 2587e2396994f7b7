"""Tensors that cannot be sparse deltas, as PEFT stores them: trained biases and modules saved in full."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..files.adapter_file import StoredDelta
from ..files.checkpoint import Checkpoint

# What PEFT adds to modules_to_save by itself.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def dense_of(delta: StoredDelta, shape: tuple[int, ...]) -> Tensor:
    """A sparse tensor in full."""
    dense = torch.zeros(math.prod(shape), dtype=delta.values.dtype)
    dense[delta.indices.long()] = delta.values
    return dense.view(shape)


class TensorsInFull:
    """What a fine-tuning changed beside the matrices that get deltas. Absolute values are stored, so differences need
    the base's values.

    Args:
        where: the source file.
        base: the base model, if there is one.
        deltas: modules that get deltas.
        diffs: differences of other parameters with their shapes, by parameter name.
        full: full values, by parameter name.
        task_type: of the adapter; for some PEFT saves and loads the model's head.
    """

    def __init__(
        self,
        where: str,
        base: Checkpoint | None,
        deltas: Mapping[str, StoredDelta],
        diffs: Mapping[str, tuple[StoredDelta, tuple[int, ...]]],
        full: Mapping[str, Tensor],
        task_type: str | None = None,
    ) -> None:
        self.where, self.base, self.deltas, self.diffs, self.full = where, base, deltas, diffs, full
        self.heads = _HEADS.get(task_type or "", ())
        self.task_type = task_type

    def collect(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by their key in an adapter file, and the config fields that go with them."""
        changed = set(self.diffs) | set(self.full)
        both = sorted(
            set(self.full) & {f"{module}.weight" for module in self.deltas} | set(self.full) & set(self.diffs)
        )
        if both:
            raise ValueError(f"{self.where}: tensor {both[0]!r} is both a difference and saved in full")
        biases = {name for name in changed if name.removesuffix(".bias") in self.deltas and name.endswith(".bias")}
        tensors = self._biases() if biases else {}
        saved = sorted({self._module_of(name) for name in changed - biases} | self._head())
        for module in saved:
            tensors |= self._module(module)
        fields: dict[str, Any] = {"bias": "spiel_only"} if biases else {}
        if saved:
            fields["modules_to_save"] = saved
        return tensors, fields

    def _module_of(self, name: str) -> str:
        """The module to save for a tensor: that of the head as a whole, else the one that owns it."""
        parts = name.split(".")
        depth = next((i + 1 for i, part in enumerate(parts[:-1]) if part in self.heads), len(parts) - 1)
        return ".".join(parts[:depth])

    def _head(self) -> set[str]:
        """The head that PEFT will ask for, whether it was changed or not."""
        if not self.heads:
            return set()
        names = [*self.full, *self.diffs, *(self.base.shapes if self.base is not None else ())]
        found = {self._module_of(name) for name in names if set(name.split(".")[:-1]) & set(self.heads)}
        if not found:
            raise ValueError(
                f"{self.where}: with task_type={self.task_type!r} PEFT loads the model's head "
                f"({' or '.join(self.heads)}) from the adapter, and the source has none; pass base= with the head, or "
                "leave task_type out"
            )
        return found

    def _biases(self) -> dict[str, Tensor]:
        """Biases of all adapted modules: PEFT expects either none of them or each."""
        names = {f"{module}.bias" for module in self.deltas}
        known = {name for name in names if self.base is not None and self.base.find(name) is not None}
        found = known | (names & (set(self.diffs) | set(self.full)))
        return {name.removesuffix("bias") + "base_layer.bias": self._value(name) for name in found}

    def _module(self, module: str) -> dict[str, Tensor]:
        names = {name for name in (*self.diffs, *self.full) if name.startswith(f"{module}.")}
        if self.base is not None:
            names |= set(self.base.tensors_of(module))
            self._check_name(module)
        nested = sorted(name for name in names if "." in name.removeprefix(f"{module}."))
        if not module or (nested and module.rpartition(".")[2] not in self.heads):
            raise ValueError(
                f"{self.where}: tensor {min(names)!r} belongs to {module or 'the model'!r}, which has further modules "
                f"({', '.join(nested[:2])}) that would have to be saved in full with it; pass others='drop' to leave "
                "everything out that is not the difference of a matrix"
            )
        return {name: self._value(name) for name in names}

    def _check_name(self, module: str) -> None:
        # PEFT saves every module whose name ends like this.
        owners = {name.rpartition(".")[0] for name in self.base.shapes}
        clashes = sorted(name for name in owners if name != module and name.endswith(module))
        if clashes and module in owners:
            raise ValueError(
                f"{self.where}: module {module!r} cannot be saved in full by that name, because PEFT would take "
                f"{clashes[0]!r} for it; pass others='drop'"
            )

    def _value(self, name: str) -> Tensor:
        if name in self.full:
            if self.base is not None and self.base.find(name) is not None:
                self._check_shape(name, self.full[name])
            return self.full[name]
        if self.base is None or not self.base.has_values:
            raise ValueError(
                f"{self.where}: tensor {name!r} cannot become a sparse delta, so it has to be saved in full, for which "
                "the values of the base model are needed; pass base=, or others='drop' to leave such tensors out"
            )
        value = self.base.value(name, self.where)
        if name in self.diffs:
            value = (value.float() + dense_of(*self.diffs[name]).float()).to(value.dtype)
        return value

    def _check_shape(self, name: str, tensor: Tensor) -> None:
        # A head of another number of classes is the task's own.
        expected = self.base.shape(name, self.where)
        if len(expected) != tensor.dim() or expected[1:] != tuple(tensor.shape)[1:]:
            raise ValueError(
                f"{self.where}: tensor {name!r} has shape {tuple(tensor.shape)}, but {expected} in {self.base.where}"
            )
