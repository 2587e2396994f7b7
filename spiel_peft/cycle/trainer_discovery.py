"""Finds out from the trainer that is running how long the run is, and where in it we are.

An optimizer does not know who steps it, and a trainer offers no registry; but it is on the call stack, and looking
there once, at the first step of a run, spares users of Trainer and TRL a callback.
"""

from __future__ import annotations

import sys
from typing import Any


def running_trainer_steps() -> int | None:
    """`state.max_steps` of the transformers Trainer that called the optimizer, None if there is none."""
    steps = getattr(_running_trainer_state(), "max_steps", 0)
    return int(steps) if steps and steps > 0 else None


def trainer_starts_anew() -> bool:
    """Whether a transformers Trainer called the optimizer for the first step of a run that it does not resume."""
    state = _running_trainer_state()
    return state is not None and state.global_step == 0


def _running_trainer_state() -> Any:
    trainer_module = sys.modules.get("transformers.trainer")
    trainer_class = getattr(trainer_module, "Trainer", None)
    if trainer_class is None:
        return None
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, trainer_class):
            return owner.state
        frame = frame.f_back
    return None
