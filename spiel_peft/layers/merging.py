"""Merges deltas into a base weight, and restores the original weight bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from spiel_kernels import adapted_entries, apply_deltas, read_entries, write_entries

from ..call_stack import is_held_elsewhere, live_objects
from ..sharding import refuse_merge
from ..weights.base_weight import (
    EntryBackup,
    ParameterBackup,
    QuantizedBackup,
    WeightBackup,
    memory_of,
    repeats_memory,
    writable,
)
from ..weights.merge_report import MERGE_IN_FLOAT32, MergeLoss, count_lost, log_loss


def used_by_others(layers: Sequence[Any], model: nn.Module | None = None) -> set[Any]:
    """The layers whose plain weight a module outside of their model uses too, by the parameter or by its memory.

    Takes about 0.2 s if anything else holds one of the weights, and no time if nothing does.

    Args:
        layers: `SpIELLayer`s.
        model: whose modules may use the weights; None: each layer's own modules alone.
    """
    plain = [layer for layer in layers if layer.quantization_backend is None]
    held = [layer for layer in plain if is_held_elsewhere(layer.computing_module(), layer.weight_name)]
    places: dict[int, list[tuple[int, int, Any]]] = {}
    for layer in held:
        memory, begin, end = memory_of(layer.get_base_layer().weight)
        places.setdefault(memory, []).append((begin, end, layer))
    own = {id(module) for module in (model.modules() if model is not None else ())}
    own |= {id(module) for layer in held for module in (layer.computing_module(), *layer.modules())}
    found = set()
    for module in live_objects(nn.Module) if held else ():
        if id(module) in own:
            continue
        tensors = [*vars(module).get("_parameters", {}).values(), *vars(module).get("_buffers", {}).values()]
        backup = vars(module).get("_backup")
        if isinstance(backup, ParameterBackup):  # of a layer that is merged into a weight of its own
            tensors.append(backup.parameter)
        for memory, begin, end in (memory_of(tensor) for tensor in tensors if tensor is not None):
            found.update(layer for first, last, layer in places.get(memory, ()) if first < end and begin < last)
    return found


class MergingMixin:
    """Merging and unmerging for `SpIELLayer`."""

    _backup: WeightBackup | None
    used_by_others: bool | None
    merge_loss: MergeLoss | None
    merged_adapters: list[str]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's delta as a dense tensor: the shape of the stored weight, the dtype of the values."""
        delta = self.spiel_delta[adapter]
        dense = torch.zeros(self.info.weight_shape, dtype=delta.values.dtype, device=delta.values.device)
        indices, values = delta()
        return write_entries(dense, indices.to(torch.int64), values.detach())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapted weight into the base layer; `unmerge` restores the originals bit for bit.

        Args:
            safe_merge: raise an error, and leave the base as it is, if the result is not finite.
            adapter_names: adapters to merge on top of those merged already; the active ones by default.

        Raises:
            ValueError: a result is not finite (only with `safe_merge`).
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.spiel_delta]
        if not names:
            return
        self._check_whole()
        before = list(self.merged_adapters)
        self.undo_interrupted()
        if self.used_by_others is None:
            self.used_by_others = bool(used_by_others([self]))
        with writable(self):
            try:
                # Deltas are always added to the originals, so that the result does not depend on earlier merges.
                self._restore_originals()
                if safe_merge:
                    self.check_finite(before + names)
                self._write_merged(before + names)
            except BaseException:  # Ctrl-C too
                self._restore_originals()
                if before:
                    self._write_merged(before)
                else:
                    self.used_by_others = None
                raise

    def check_finite(self, adapter_names: list[str]) -> None:
        """Raise a ValueError if adding these adapters gives a value that is not finite in the base's dtype."""
        pairs = self._pairs(adapter_names)
        if not pairs:
            return
        self._check_whole()
        _, sums = adapted_entries(self._read_base_weight(), pairs)
        if not torch.isfinite(sums.to(self._base_dtype())).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_names[-1]} seems to be broken")

    def _check_whole(self) -> None:
        refuse_merge(getattr(self.get_base_layer(), "weight", None), self.module_name)

    def _pairs(self, adapter_names: list[str]) -> list[tuple[Tensor, Tensor]]:
        pairs = [self.spiel_delta[name]() for name in adapter_names if name in self.spiel_delta]
        return [(indices, values.detach()) for indices, values in pairs]

    def _write_merged(self, adapter_names: list[str]) -> None:
        base = self.get_base_layer()
        self.undo_interrupted()
        if self.quantization_backend is not None:
            self._write_quantized(base, adapter_names)
        elif self.shared_with or self.used_by_others or repeats_memory(base.weight):
            self._write_shared(base, adapter_names)
        else:
            weight = base.weight.detach()
            positions, sums = adapted_entries(weight, self._pairs(adapter_names))
            originals, rounded = read_entries(weight, positions), sums.to(weight.dtype)
            self._backup = EntryBackup(positions, originals)
            write_entries(weight, positions, rounded)
            self._count_loss(originals, sums, rounded)
        self.merged_adapters = list(adapter_names)

    def _count_loss(self, originals: Tensor, sums: Tensor, rounded: Tensor) -> None:
        """Count the deltas that rounding to a half-precision weight has lost; in float32 hardly any are."""
        half = rounded.dtype in (torch.bfloat16, torch.float16) and not rounded.is_meta
        self.merge_loss = count_lost(originals, sums, rounded) if half else None

    def _write_shared(self, base: nn.Module, adapter_names: list[str]) -> None:
        original = base.weight
        partner = next((layer for layer in self.tied_to if layer.merged_adapters == adapter_names), None)
        if partner is not None:
            merged = partner.get_base_layer().weight
        else:
            pairs = self._pairs(adapter_names)
            positions, sums = adapted_entries(original.detach(), pairs)
            data = apply_deltas(original.detach(), pairs)
            self._count_loss(original.detach().take(positions), sums, data.take(positions))
            merged = nn.Parameter(data, requires_grad=original.requires_grad)
        self._backup = ParameterBackup(original)
        base.weight = merged

    def _write_quantized(self, base: nn.Module, adapter_names: list[str]) -> None:
        backend = self.quantization_backend
        warnings.warn(
            f"Merging a SpIEL adapter into {backend.backend_name} weights rounds the result to the quantization grid: "
            "small deltas are lost and other entries may move. The packed weights are kept in CPU memory until "
            "unmerge, which restores them exactly. For deployment, merge into the unquantized base model instead.",
            stacklevel=4,
        )
        # Before the weight is read: PEFT's reading of an 8-bit weight changes attributes of the layer.
        backup = QuantizedBackup(base)
        original = self.get_base_weight()
        positions, sums = adapted_entries(original, self._pairs(adapter_names))
        before = read_entries(original, positions)
        self._backup = backup
        self.set_base_weight(write_entries(original.clone(), positions, sums.to(original.dtype)))
        backup.pack_away()
        self.merge_loss = count_lost(before, sums, read_entries(self.get_base_weight(), positions))

    def _restore_originals(self) -> None:
        if self._backup is not None:
            with writable(self):
                self._backup.restore(self)
            self._backup = None
        self.merged_adapters = []

    def keep_merged(self) -> None:
        """Forget the originals: the merged weight is the base weight from now on."""
        self._backup = None

    def unmerge(self) -> None:
        """Undo `merge`: every overwritten weight gets its original bits back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore_originals()
        self.used_by_others = None


def report_merge_loss(layers: Sequence[Any]) -> None:
    """Warn or log how many deltas the merge of these layers lost to rounding, by kind of weight."""
    quantized, rounded = MergeLoss(), MergeLoss()
    dtypes: set[str] = set()
    for layer in layers:
        if layer.merge_loss is None or not layer.merged:
            continue
        if layer.quantization_backend is not None:
            quantized += layer.merge_loss
        else:
            rounded += layer.merge_loss
            dtypes.add(str(layer.get_base_layer().weight.dtype).removeprefix("torch."))
    if quantized.total:
        warnings.warn(
            f"Quantization lost {quantized.lost} of {quantized.total} merged deltas ({quantized.share:.1%}): these "
            "entries moved by less than half of their delta.",
            stacklevel=3,
        )
    # Logged and no Python warning: every merge into half precision rounds, such as each sync with vLLM.
    log_loss(rounded, " and ".join(sorted(dtypes)), MERGE_IN_FLOAT32)
