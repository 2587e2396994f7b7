"""Fields of PEFT's LoraConfig that mean nothing to SpIEL, and what to do instead of passing them."""

from __future__ import annotations

import dataclasses
from typing import Any

from ._config_checks import short

_NO_SCALING = "SpIEL's deltas are added to the weight as they are: drop it, and tune the learning rate instead."
_NO_FACTORS = "It configures a variant of LoRA's two factors, which SpIEL does not have: drop it."
_INIT = "Drop it. Deltas start at zero; `init_weights=False` starts them at random values, for tests."
_MEGATRON = "SpIEL does not adapt Megatron's parallel layers: drop it."

LORA_ONLY_FIELDS: dict[str, str] = {
    "lora_alpha": _NO_SCALING,
    "alpha_pattern": _NO_SCALING,
    "use_rslora": _NO_SCALING,
    "lora_dropout": "SpIEL has no adapter branch: drop it. Use the model's own dropout, or weight decay.",
    "lora_bias": 'Drop it. To train biases, use `bias="all"` or `bias="spiel_only"`.',
    "init_lora_weights": _INIT,
    "loftq_config": _INIT,
    "eva_config": _INIT,
    "corda_config": _INIT,
    "lora_ga_config": _INIT,
    "use_dora": _NO_FACTORS,
    "use_qalora": _NO_FACTORS,
    "qalora_group_size": _NO_FACTORS,
    "use_bdlora": _NO_FACTORS,
    "velora_config": _NO_FACTORS,
    "kasa_config": _NO_FACTORS,
    "monteclora_config": _NO_FACTORS,
    "arrow_config": _NO_FACTORS,
    "alora_invocation_tokens": "SpIEL changes the weights for every token: drop it.",
    "layer_replication": "SpIEL adapts the layers the model has: drop it.",
    "runtime_config": "SpIEL moves nothing between devices at run time: drop it.",
    "megatron_config": _MEGATRON,
    "megatron_core": _MEGATRON,
}


class RefusesLoraFields:
    """Mixin: LoRA-only keyword arguments raise a ValueError that says what to use instead.

    `__new__` rather than `__init__`, for two reasons: the generated `__init__` of every subclass stays as it
    is, so PEFT still reads the fields from its signature, and unknown names still raise the TypeError that
    PEFT turns into a warning when it loads a file of a later version.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        own = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        errors = [
            f"`{name}` is a field of LoraConfig that {cls.__name__} must not be given, got {short(value)}. "
            f"{LORA_ONLY_FIELDS[name]}"
            for name, value in kwargs.items()
            if name in LORA_ONLY_FIELDS and name not in own
        ]
        if errors:
            raise ValueError("\n".join(errors))
        return super().__new__(cls)
