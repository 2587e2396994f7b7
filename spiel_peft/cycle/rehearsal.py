"""Steps that are none: PyTorch's distributed checkpoints step an optimizer to have it make its state."""

from __future__ import annotations

import sys
from types import FrameType

_MODULE = "torch.distributed.checkpoint.state_dict"
_FUNCTION = "_init_optim_state"
# Frames between that function and a step hook: wrappers of accelerate, of schedulers, of the step itself.
_DEPTH = 16


def is_rehearsal() -> bool:
    """Whether the step in progress is one with zero gradients and a learning rate of zero, before state is loaded."""
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
