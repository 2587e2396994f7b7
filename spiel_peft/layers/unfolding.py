"""Deltas that live in the base weight between two optimizer steps: everybody who looks at it gets the original."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..resident import WeightFold


class UnfoldingModule:
    """A module that unfolds before its state is read or loaded, and before it is copied or moved; its first base."""

    def unfold(self) -> None:
        """Take deltas that live in base weights out of them, bit for bit (see `spiel_peft.resident`)."""
        raise NotImplementedError

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.unfold()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unfold()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.unfold()
        return self.__dict__.copy()

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self.unfold()
        return super()._apply(fn, recurse)


class UnfoldingMixin(UnfoldingModule):
    """The part of `SpIELLayer` that unfolds before anybody looks at its weight, too, or switches adapters."""

    _fold: WeightFold

    def unfold(self) -> None:
        """Take deltas that live in the base weight out of it, bit for bit (see `spiel_peft.resident`)."""
        self._fold.unfold()

    def get_base_weight(self) -> Tensor:
        """The base weight without deltas, dequantized if need be."""
        self.unfold()
        return super().get_base_weight()

    @property
    def weight(self) -> Tensor:
        """The base layer's weight as it is stored, without deltas."""
        self.unfold()
        return super().weight

    def train(self, mode: bool = True) -> nn.Module:
        if not mode:
            self.unfold()
        return super().train(mode)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        self.unfold()
        super().set_adapter(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        self.unfold()
        super().delete_adapter(adapter_name)
