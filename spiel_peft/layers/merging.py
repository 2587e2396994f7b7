"""Merges deltas into a base weight, and restores the original weight bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
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
    onloaded,
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
        merging = vars(module).get("merging")
        if isinstance(merging, Merging) and isinstance(merging._backup, ParameterBackup):
            tensors.append(merging._backup.parameter)  # the layer is merged into a weight of its own
        for memory, begin, end in (memory_of(tensor) for tensor in tensors if tensor is not None):
            found.update(layer for first, last, layer in places.get(memory, ()) if first < end and begin < last)
    return found


class Merging:
    """What is merged into the base weight of a layer, and the originals that unmerging puts back.

    Each layer owns one and hands itself in with every request: nothing here refers to it, so copies need no care.

    Attributes:
        adapters: names of the merged adapters; after each change another list.
        loss: how many deltas the last merge lost to rounding; None where that is not counted.
        used_by_others: whether another model uses the weight, as the merge of a whole model has found; None: `add`
            looks for itself.
    """

    def __init__(self) -> None:
        self.adapters: list[str] = []
        self.loss: MergeLoss | None = None
        self.used_by_others: bool | None = None
        self._backup: WeightBackup | None = None

    def add(self, layer: Any, adapter_names: list[str], safe: bool) -> None:
        """Merge adapters on top of those merged already. After an error, Ctrl-C too, all is as before.

        Args:
            layer: the `SpIELLayer` that owns this.
            adapter_names: of adapters that the layer has and that are not merged.
            safe: raise a ValueError if the result is not finite.
        """
        _refuse_sharded(layer)
        before, after = self.adapters, self.adapters + adapter_names
        layer.undo_interrupted()
        if self.used_by_others is None:
            self.used_by_others = bool(used_by_others([layer]))
        with writable(layer):
            try:
                # Deltas are always added to the originals, so that the result does not depend on earlier merges.
                self._restore(layer)
                if safe:
                    check_finite(layer, after)
                self._write(layer, after)
            except BaseException:
                self.reset(layer, before)
                raise

    def reset(self, layer: Any, adapter_names: list[str]) -> None:
        """Put the originals back, bit for bit, and merge these adapters alone, if there are any."""
        with writable(layer):
            self._restore(layer)
            if adapter_names:
                self._write(layer, adapter_names)
            else:
                self.used_by_others = None

    def forget_originals(self) -> None:
        """Keep the merged weight as the base weight from now on."""
        self._backup = None

    def _restore(self, layer: Any) -> None:
        if self._backup is not None:
            self._backup.restore(layer)
            self._backup = None
        self.adapters = []

    def _write(self, layer: Any, adapter_names: list[str]) -> None:
        if layer.quantization_backend is not None:
            self.loss = self._write_quantized(layer, adapter_names)
        elif layer.shared_with or self.used_by_others or repeats_memory(layer.get_base_layer().weight):
            self.loss = self._write_copy(layer, adapter_names)
        else:
            self.loss = self._write_in_place(layer, adapter_names)
        self.adapters = list(adapter_names)

    # Each way to write notes the originals before it changes anything, and counts the deltas that rounding loses.

    def _write_in_place(self, layer: Any, adapter_names: list[str]) -> MergeLoss | None:
        weight = layer.get_base_layer().weight.detach()
        positions, sums = adapted_entries(weight, _pairs(layer, adapter_names))
        originals, rounded = read_entries(weight, positions), sums.to(weight.dtype)
        self._backup = EntryBackup(positions, originals)
        write_entries(weight, positions, rounded)
        return _loss_in_half(originals, sums, rounded)

    def _write_copy(self, layer: Any, adapter_names: list[str]) -> MergeLoss | None:
        """Give the layer a parameter of its own, or that of the layer it is tied to if the same is merged there."""
        base = layer.get_base_layer()
        original, loss = base.weight, None
        partner = next((other for other in layer.tied_to if other.merged_adapters == adapter_names), None)
        if partner is not None:
            merged = partner.get_base_layer().weight
        else:
            weight, pairs = original.detach(), _pairs(layer, adapter_names)
            positions, sums = adapted_entries(weight, pairs)
            data = apply_deltas(weight, pairs)
            loss = _loss_in_half(weight.take(positions), sums, data.take(positions))
            merged = nn.Parameter(data, requires_grad=original.requires_grad)
        self._backup = ParameterBackup(original)
        base.weight = merged
        return loss

    def _write_quantized(self, layer: Any, adapter_names: list[str]) -> MergeLoss:
        warnings.warn(
            f"Merging a SpIEL adapter into {layer.quantization_backend.backend_name} weights rounds the result to the "
            "quantization grid: small deltas are lost and other entries may move. The packed weights are kept in CPU "
            "memory until unmerge, which restores them exactly. For deployment, merge into the unquantized base model "
            "instead.",
            stacklevel=5,  # at the line that calls the layer's `merge`
        )
        # Before the weight is read: PEFT's reading of an 8-bit weight changes attributes of the layer.
        backup = QuantizedBackup(layer.get_base_layer())
        original = layer.get_base_weight()
        positions, sums = adapted_entries(original, _pairs(layer, adapter_names))
        before = read_entries(original, positions)
        self._backup = backup
        layer.set_base_weight(write_entries(original.clone(), positions, sums.to(original.dtype)))
        backup.pack_away()
        return count_lost(before, sums, read_entries(layer.get_base_weight(), positions))


def check_finite(layer: Any, adapter_names: list[str]) -> None:
    """Raise a ValueError if adding these adapters to the base weight of a layer gives a value that is not finite.

    Args:
        layer: a `SpIELLayer` with nothing merged.
        adapter_names: those that the layer does not have are left out.
    """
    pairs = _pairs(layer, adapter_names)
    if not pairs:
        return
    _refuse_sharded(layer)
    with onloaded(layer.get_base_layer()):
        _, sums = adapted_entries(layer.get_base_weight(), pairs)
    if not torch.isfinite(sums.to(layer.rounding_dtype(None))).all():
        raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_names[-1]} seems to be broken")


def _refuse_sharded(layer: Any) -> None:
    refuse_merge(getattr(layer.get_base_layer(), "weight", None), layer.module_name)


def _pairs(layer: Any, adapter_names: list[str]) -> list[tuple[Tensor, Tensor]]:
    pairs = [layer.spiel_delta[name]() for name in adapter_names if name in layer.spiel_delta]
    return [(indices, values.detach()) for indices, values in pairs]


def _loss_in_half(originals: Tensor, sums: Tensor, rounded: Tensor) -> MergeLoss | None:
    """Count the deltas that rounding to a half-precision weight has lost; in float32 hardly any are."""
    half = rounded.dtype in (torch.bfloat16, torch.float16) and not rounded.is_meta
    return count_lost(originals, sums, rounded) if half else None


def report_merge_loss(layers: Sequence[Any]) -> None:
    """Warn or log how many deltas the merge of these layers lost to rounding, by kind of weight."""
    quantized, rounded = MergeLoss(), MergeLoss()
    dtypes: set[str] = set()
    for layer in layers:
        loss = layer.merging.loss
        if loss is None or not layer.merged:
            continue
        if layer.quantization_backend is not None:
            quantized += loss
        else:
            rounded += loss
            dtypes.add(str(layer.get_base_layer().weight.dtype).removeprefix("torch."))
    if quantized.total:
        warnings.warn(
            f"Quantization lost {quantized.lost} of {quantized.total} merged deltas ({quantized.share:.1%}): these "
            "entries moved by less than half of their delta.",
            stacklevel=3,
        )
    # Logged and no Python warning: every merge into half precision rounds, such as each sync with vLLM.
    log_loss(rounded, " and ".join(sorted(dtypes)), MERGE_IN_FLOAT32)
