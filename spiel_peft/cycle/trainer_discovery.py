"""Finds the trainer that is running: it knows how many optimizer steps the run has, and takes log entries."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any


def running_trainer() -> Any:
    """The transformers Trainer whose method is on the call stack, None if there is none.

    An optimizer or callback does not know who calls it, and a trainer offers no registry; but it is on the call stack,
    and looking there spares users of Trainer and TRL an argument.
    """
    trainer_module = sys.modules.get("transformers.trainer")
    trainer_class = getattr(trainer_module, "Trainer", None)
    if trainer_class is None:
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, trainer_class):
            return owner
        frame = frame.f_back
    return None


def trainer_state(trainer: Any) -> Any:
    """The `TrainerState` of a trainer that says how long it trains, else None."""
    state = getattr(trainer, "state", None)
    return state if state is not None and state.max_steps > 0 else None
