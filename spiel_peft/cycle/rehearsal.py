"""Steps that are none: PyTorch's distributed checkpoints step an optimizer to have it make its state."""

from __future__ import annotations

from ..call_stack import is_running

_MODULE = "torch.distributed.checkpoint.state_dict"
_FUNCTION = "_init_optim_state"
# Frames between that function and a step hook: wrappers of accelerate, of schedulers, of the step itself.
_DEPTH = 17


def is_rehearsal() -> bool:
    """Whether the step in progress is one with zero gradients and a learning rate of zero, before state is loaded."""
    return is_running(_MODULE, _FUNCTION, _DEPTH)
