"""The part of `SpIELModel` that merges: all layers, or none."""

from __future__ import annotations

from typing import Any

from torch import nn

from .layers import SpIELLayer
from .layers.merging import report_merge_loss


class ModelMerging:
    """Merging for a PEFT tuner whose layers are SpIEL layers; comes before the tuner's base class."""

    model: nn.Module
    peft_config: dict[str, Any]
    active_adapters: list[str]

    def _spiel_layers(self) -> list[SpIELLayer]:
        return [m for m in self.model.modules() if isinstance(m, SpIELLayer)]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights; all layers or, on an error, none.

        Raises:
            ValueError: an unknown adapter, or (with `safe_merge`) a result that is not finite.
        """
        self._check_before_merge(adapter_names, safe_merge)
        before = [(layer, list(layer.merged_adapters)) for layer in self._spiel_layers()]
        try:
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        except Exception:
            for layer, names in before:
                if layer.merged_adapters != names:
                    layer._restore_originals()
                    if names:
                        layer._write_merged(names)
            raise
        report_merge_loss(self._spiel_layers())

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_before_merge(adapter_names, safe_merge)
        else:
            for layer in self._spiel_layers():
                layer.undo_interrupted()
                if layer.merged:
                    layer.unmerge()
        layers = self._spiel_layers()
        model = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        if merge:
            report_merge_loss(layers)
        return model

    def _check_before_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        if isinstance(names, str):
            return  # PEFT raises its own TypeError
        unknown = sorted(set(names) - set(self.peft_config))
        if unknown:
            raise ValueError(f"Adapters {unknown} do not exist; there are {sorted(self.peft_config)}")
        if not safe_merge:
            return
        for layer in self._spiel_layers():
            if not layer.merged:
                layer.check_finite(list(names))
