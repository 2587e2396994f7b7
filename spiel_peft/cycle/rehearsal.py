"""Detects the dummy step with which torch.distributed.checkpoint creates optimizer state."""

from __future__ import annotations

from ..call_stack import is_running

# Frames between PyTorch's function and a step hook: wrappers of accelerate, of schedulers, of the step itself.
_STEP_HOOK_DEPTH = 17


def is_rehearsal() -> bool:
    """Whether the step in progress is one with zero gradients and a learning rate of zero, before state is loaded."""
    return is_running("torch.distributed.checkpoint.state_dict", "_init_optim_state", _STEP_HOOK_DEPTH)
