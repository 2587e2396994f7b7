"""Accelerate's `cpu_ram_efficient_loading`: only one process of a machine has read the base weights.

Accelerate then takes the model to the meta device, has FSDP2 shard it there, and sends round what the first process
has. Every process has the deltas, which are not sharded: they stay as they are, and out of that state dict.
"""

from __future__ import annotations

import sys
from types import FrameType

_MODULE = "accelerate.utils.fsdp_utils"
_FUNCTION = "fsdp2_prepare_model"
# Calls between that function and a module deep inside the model.
_DEPTH = 200


def prepares_sharding() -> bool:
    """Whether accelerate is preparing a model for FSDP2 right now."""
    if _MODULE not in sys.modules:
        return False
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame is None:
            return False
        if frame.f_code.co_name == _FUNCTION and frame.f_globals.get("__name__") == _MODULE:
            return True
        frame = frame.f_back
    return False
