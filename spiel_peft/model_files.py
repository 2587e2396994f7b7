"""The part of `SpIELModel` that saves and loads: what is in an adapter file, and refusing it as a whole."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from .checkpoint import (
    CHECKPOINTED,
    MARKER,
    SizeCheck,
    check_adapter_tensors,
    check_live_state_dict,
    checkpointed_entries,
    drop_orphans,
    own_names,
)
from .config import SpIELConfig
from .layers import SpIELLayer
from .structure import check_unmerged, discard_unloaded
from .training_state import STATE_KEYS

_PEFT_PREFIX = "base_model.model."


class ModelFiles:
    """Saving and loading for a PEFT tuner whose layers are SpIEL layers; comes before the tuner's base class."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SpIELConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        out = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        out.update(checkpointed_entries(model, state_dict, biases=config.bias == "spiel_only"))
        if not config.inference_mode:
            out.update(cls._training_entries(model, adapter_name))
        return own_names(model, out)

    @staticmethod
    def _training_entries(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        out = {}
        # Not part of `model.state_dict()`: a trained and a loaded model have the same keys there.
        for name, layer in model.named_modules():
            if isinstance(layer, SpIELLayer) and adapter_name in layer.spiel_delta:
                for key, tensor in layer.spiel_delta[adapter_name].training_tensors().items():
                    out[f"{name.replace(CHECKPOINTED, '')}{MARKER}{adapter_name}.{key}"] = tensor
        return out

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: SpIELConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        check_unmerged(model, adapter_name, "loaded")
        deltas = {
            name.replace("_orig_mod.", "").replace(CHECKPOINTED, "").removeprefix(_PEFT_PREFIX): layer.spiel_delta[
                adapter_name
            ]
            for name, layer in model.named_modules()
            if isinstance(layer, SpIELLayer) and adapter_name in layer.spiel_delta
        }
        state_dict = drop_orphans({k.replace("._orig_mod.", "."): v for k, v in state_dict.items()})
        if config.inference_mode:
            state_dict = {k: v for k, v in state_dict.items() if k.rpartition(".")[2] not in STATE_KEYS}
        discard = partial(discard_unloaded, model, config, adapter_name, list(deltas.values()))
        try:
            check_adapter_tensors({k.removeprefix(_PEFT_PREFIX): v for k, v in state_dict.items()}, deltas)
        except ValueError:
            discard()
            raise
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        SizeCheck(model, discard)
        return _name_training_state(model, adapter_name, remapped)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Runs before the same method of any layer.
        check_live_state_dict(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _name_training_state(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give saved training state the adapter's name; PEFT maps only keys that the model already has."""
    prefixed = any(name.startswith(_PEFT_PREFIX) for name, _ in model.named_modules())
    out = {}
    for key, tensor in state_dict.items():
        module, _, name = key.rpartition(MARKER)
        if name in STATE_KEYS:
            if not prefixed:
                module = module.removeprefix(_PEFT_PREFIX)
            key = f"{module}{MARKER}{adapter_name}.{name}"
        out[key] = tensor
    return out
