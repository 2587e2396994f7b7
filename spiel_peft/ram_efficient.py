"""Accelerate's `cpu_ram_efficient_loading`: only one process of a machine has read the base weights.

Accelerate then takes the model to the meta device, has FSDP2 shard it there, and sends round what the first process
has. Every process has the deltas, which are not sharded: they stay as they are, and out of that state dict.
"""

from __future__ import annotations

from .call_stack import is_running

# Calls between accelerate's function and a module deep inside the model.
_PREPARING_DEPTH = 201


def prepares_sharding() -> bool:
    """Whether accelerate is preparing a model for FSDP2 right now."""
    return is_running("accelerate.utils.fsdp_utils", "fsdp2_prepare_model", _PREPARING_DEPTH)
