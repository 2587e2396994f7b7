"""Looks at the call stack, for what other libraries do without a hook: all that does so is in this file."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any


def is_running(module: str, function: str, depth: int) -> bool:
    """Whether a function is on the call stack of this thread.

    Args:
        module: full name of the module that defines it.
        function: its name.
        depth: how many callers are looked at.
    """
    if module not in sys.modules:
        return False
    frame: FrameType | None = sys._getframe(1)
    for _ in range(depth):
        if frame is None:
            return False
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back
    return False


# Accelerate's `cpu_ram_efficient_loading`: only one process of a machine has read the base weights.
#
# Accelerate then takes the model to the meta device, has FSDP2 shard it there, and sends round what the first process
# has. Every process has the deltas, which are not sharded: they stay as they are, and out of that state dict.


# Calls between accelerate's function and a module deep inside the model.
_PREPARING_DEPTH = 201


def prepares_sharding() -> bool:
    """Whether accelerate is preparing a model for FSDP2 right now."""
    return is_running("accelerate.utils.fsdp_utils", "fsdp2_prepare_model", _PREPARING_DEPTH)


# Finds the trainer that is running: it knows how many optimizer steps the run has, and takes log entries.


_TRANSFORMERS = ("transformers.trainer",)
# Both names under which it is published.
_LIGHTNING = ("lightning.pytorch.trainer.trainer", "pytorch_lightning.trainer.trainer")


@dataclass(frozen=True)
class Progress:
    """What is asked of a transformers `TrainerState`, as another trainer answers it.

    Attributes:
        max_steps: optimizer steps of the whole run; 0 if it cannot say.
        global_step: optimizer steps done.
    """

    max_steps: int
    global_step: int


class LightningRun:
    """A Lightning Trainer in the form of a transformers one."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    @property
    def state(self) -> Progress:
        return Progress(self._max_steps(), int(self.trainer.global_step))

    def _max_steps(self) -> int:
        module = self.trainer.lightning_module
        accumulation_changes = any(
            type(callback).__name__ == "GradientAccumulationScheduler" for callback in self.trainer.callbacks
        )
        if module is None or not module.automatic_optimization or accumulation_changes:
            # Its estimate counts batches then, which need not be steps.
            return 0
        steps = self.trainer.estimated_stepping_batches
        return int(steps) if math.isfinite(steps) and steps > 0 else 0


def running_trainer() -> Any:
    """The transformers Trainer whose method is on the call stack, or a `LightningRun`; None if there is neither.

    An optimizer or callback does not know who calls it, and a trainer offers no registry; but it is on the call stack,
    and looking there spares users of Trainer, TRL and Lightning an argument.
    """
    transformers_classes, lightning_classes = tuple(_classes(_TRANSFORMERS)), tuple(_classes(_LIGHTNING))
    if not transformers_classes and not lightning_classes:
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, transformers_classes):
            return owner
        if isinstance(owner, lightning_classes):
            return LightningRun(owner)
        frame = frame.f_back
    return None


def _classes(modules: tuple[str, ...]) -> Iterator[type]:
    """The `Trainer` of each module that has been imported; who runs one has."""
    for name in modules:
        found = getattr(sys.modules.get(name), "Trainer", None)
        if isinstance(found, type):
            yield found


def trainer_state(trainer: Any) -> Any:
    """The `TrainerState` (or `Progress`) of a trainer that says how long it trains, else None."""
    state = getattr(trainer, "state", None)
    return state if state is not None and state.max_steps > 0 else None


# Detects the dummy step with which torch.distributed.checkpoint creates optimizer state.


# Frames between PyTorch's function and a step hook: wrappers of accelerate, of schedulers, of the step itself.
_STEP_HOOK_DEPTH = 17


def is_rehearsal() -> bool:
    """Whether the step in progress is one with zero gradients and a learning rate of zero, before state is loaded."""
    return is_running("torch.distributed.checkpoint.state_dict", "_init_optim_state", _STEP_HOOK_DEPTH)
