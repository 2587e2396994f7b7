"""Looks at the call stack and at all live objects to learn what other libraries do. No other file looks there.

PyTorch, accelerate and the trainers offer no hook or registry for the questions that these functions answer.
"""

from __future__ import annotations

import gc
import math
import sys
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")

# At most so many calls lie between accelerate's `fsdp2_prepare_model` and a module deep inside the model.
_PREPARING_DEPTH = 201
# At most so many calls lie between PyTorch's `_init_optim_state` and a step hook: the wrappers that accelerate,
# learning-rate schedulers and PyTorch put around `step`.
_STEP_HOOK_DEPTH = 17

_TRANSFORMERS = ("transformers.trainer",)
# Lightning is published under two names.
_LIGHTNING = ("lightning.pytorch.trainer.trainer", "pytorch_lightning.trainer.trainer")

# The code of the function that PyTorch puts around the `step` of every optimizer to run its step hooks.
_HOOKED_STEP = torch.optim.Optimizer.profile_hook_step(lambda optimizer: None).__code__


def is_running(module: str, function: str, depth: int) -> bool:
    """Whether a function is on the call stack of this thread.

    Args:
        module: full name of the module that defines the function.
        function: name of the function.
        depth: number of callers to look at.
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


def prepares_sharding() -> bool:
    """Whether accelerate is preparing a model for FSDP2 right now.

    With `cpu_ram_efficient_loading`, only one process of a machine has read the base weights. Accelerate moves the
    model to the meta device, has FSDP2 shard it there, and sends the weights of that process to the others. Deltas are
    not sharded and every process has them, so they must neither move nor be in that state dict.
    """
    return is_running("accelerate.utils.fsdp_utils", "fsdp2_prepare_model", _PREPARING_DEPTH)


def is_rehearsal() -> bool:
    """Whether the optimizer step in progress is the dummy step of torch.distributed.checkpoint.

    That step, with zero gradients and a learning rate of zero, creates optimizer state for a checkpoint to be loaded.
    """
    return is_running("torch.distributed.checkpoint.state_dict", "_init_optim_state", _STEP_HOOK_DEPTH)


@dataclass(frozen=True)
class Progress:
    """The two fields of a transformers `TrainerState` that the cycle reads, for another trainer.

    Attributes:
        max_steps: optimizer steps of the whole run; 0 if the trainer does not know.
        global_step: optimizer steps done.
    """

    max_steps: int
    global_step: int


class LightningRun:
    """A Lightning Trainer with the `state` that a transformers Trainer has."""

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
            # Lightning's estimate then counts batches, and a step may take several of them.
            return 0
        steps = self.trainer.estimated_stepping_batches
        return int(steps) if math.isfinite(steps) and steps > 0 else 0


def running_trainer() -> Any:
    """The transformers Trainer whose method is on the call stack, or a `LightningRun`; None if there is neither.

    Optimizers and callbacks are not told which trainer calls them. Looking at the call stack spares users of Trainer,
    TRL and Lightning an argument.
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
    """The class `Trainer` of each of these modules that has been imported."""
    for name in modules:
        found = getattr(sys.modules.get(name), "Trainer", None)
        if isinstance(found, type):
            yield found


def trainer_state(trainer: Any) -> Any:
    """The `TrainerState` or `Progress` of a trainer; None if there is no trainer or it does not know its length."""
    state = getattr(trainer, "state", None)
    return state if state is not None and state.max_steps > 0 else None


def running_steps() -> Counter[int]:
    """How many calls of `step` with step hooks are running for each optimizer, by the optimizer's id."""
    found: Counter[int] = Counter()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _HOOKED_STEP:
            found[id(frame.f_locals.get("self"))] += 1
        frame = frame.f_back
    return found


def optimizers_without_hooks(known: Set[int]) -> list[torch.optim.Optimizer]:
    """Optimizers whose `step` is running without step hooks and that have state of their own, outermost first.

    PyTorch adds step hooks in `torch.optim.Optimizer.__init__`, which some optimizers around others do not call.

    Args:
        known: ids of optimizers to leave out.
    """
    found: dict[int, torch.optim.Optimizer] = {}
    hooked = set(known)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _HOOKED_STEP:
            hooked.add(id(frame.f_locals.get("self")))
        elif frame.f_code.co_name == "step":
            owner = frame.f_locals.get("self")
            if isinstance(owner, torch.optim.Optimizer) and "state" in vars(owner):
                found[id(owner)] = owner
        frame = frame.f_back
    return [optimizer for number, optimizer in reversed(found.items()) if number not in hooked]


def live_objects(kind: type[T]) -> list[T]:
    """All live objects of a class that the garbage collector knows; takes about 0.2 s.

    After `gc.freeze()` the collector no longer lists the objects that it knew before.
    """
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]


def is_held_elsewhere(module: nn.Module, name: str) -> bool:
    """Whether anything besides a module may hold its parameter or the memory of it. True if that cannot be told.

    Reference counts tell it at once, where a search through all live objects takes long.
    """
    if _ALONE is None:
        return True
    return any(count > alone for count, alone in zip(_references(module, name) or _ALONE, _ALONE, strict=True))


def _references(module: nn.Module, name: str) -> tuple[int, int] | None:
    """How often a parameter, and its memory, are referenced from anywhere; None if PyTorch does not tell."""
    count_of_storage = getattr(torch._C, "_storage_Use_Count", None)
    parameter = module._parameters.get(name)
    if count_of_storage is None or type(parameter) is not nn.Parameter:  # a sharded weight is of a subclass
        return None
    return sys.getrefcount(parameter), count_of_storage(parameter.untyped_storage()._cdata)


# The counts of a parameter that its module alone holds.
_ALONE = _references(nn.Linear(1, 1), "weight")
