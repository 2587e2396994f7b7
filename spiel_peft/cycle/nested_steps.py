"""Optimizers that step other optimizers: one training step, however many of them take part in it.

Sharpness-aware minimization, Lookahead and PyTorch's ZeroRedundancyOptimizer are optimizers around an optimizer, both
with hooks. The outermost step is the one that counts; the state of all that took part follows the indices.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field
from types import FrameType

import torch

_Reference = weakref.ref[torch.optim.Optimizer]
# What runs the hooks around every step.
_HOOKED_STEP = torch.optim.Optimizer.profile_hook_step(lambda optimizer: None).__code__


@dataclass(eq=False)
class _OpenStep:
    """A step in progress: the outermost optimizer, ids of what it holds, and the optimizers it has stepped.

    A subclass whose step calls its base class's is stepped by itself; `depth` counts these.
    """

    optimizer: _Reference
    parameters: set[int]
    depth: int = 1
    parts: list[_Reference] = field(default_factory=list)


class _OpenSteps(threading.local):
    def __init__(self) -> None:
        self.stack: list[_OpenStep] = []


_OPEN = _OpenSteps()


def begin(optimizer: torch.optim.Optimizer, parameters: set[int]) -> bool:
    """Note that a step begins; whether it is one of its own, not part of another one.

    Args:
        optimizer: about to step.
        parameters: ids of the deltas' values that it holds.
    """
    if _OPEN.stack:
        # Steps that an exception has ended are not on the call stack any more; the one that begins is.
        running = _steps_on_the_call_stack()
        running[id(optimizer)] -= 1
        open_steps = [(step, step.optimizer()) for step in _OPEN.stack]
        _OPEN.stack = [step for step, other in open_steps if other is not None and running[id(other)] > 0]
        for step in _OPEN.stack:
            step.depth = running[id(step.optimizer())]
    for step in _OPEN.stack:
        if step.optimizer() is optimizer:
            step.depth += 1
            return False
        if step.parameters & parameters:
            step.parts.append(weakref.ref(optimizer))
            return False
    _OPEN.stack.append(_OpenStep(weakref.ref(optimizer), parameters))
    return True


def end(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Note that a step has ended: the optimizers that took part, outer ones first; none if it was part of another."""
    for step in _OPEN.stack:
        if step.optimizer() is optimizer:
            step.depth -= 1
            if step.depth:
                return []
            _OPEN.stack.remove(step)
            parts = [part() for part in step.parts]
            took_part = [optimizer, *dict.fromkeys(part for part in parts if part is not None)]
            return [*_around_without_hooks(took_part), *took_part]
        if any(part() is optimizer for part in step.parts):
            return []
    return [*_around_without_hooks([optimizer]), optimizer]


def _steps_on_the_call_stack() -> Counter[int]:
    """How many steps of each optimizer, by id, are running."""
    found: Counter[int] = Counter()
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _HOOKED_STEP:
            found[id(frame.f_locals.get("self"))] += 1
        frame = frame.f_back
    return found


def _around_without_hooks(took_part: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """Optimizers with state of their own in whose steps this one is, and that nobody hears of.

    Hooks come with `torch.optim.Optimizer.__init__`, which some optimizers around others do not call.
    """
    found: dict[int, torch.optim.Optimizer] = {}
    heard = {id(optimizer) for optimizer in took_part}
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _HOOKED_STEP:
            heard.add(id(frame.f_locals.get("self")))
        elif frame.f_code.co_name == "step":
            owner = frame.f_locals.get("self")
            if isinstance(owner, torch.optim.Optimizer) and "state" in vars(owner):
                found[id(owner)] = owner
        frame = frame.f_back
    return [optimizer for number, optimizer in reversed(found.items()) if number not in heard]


def inner_optimizers(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.optim.Optimizer]]:
    """The optimizers among an optimizer's attributes, lists and dicts included, each with the attribute's name."""
    found = []
    for name, value in vars(optimizer).items():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        found += [(name, inner) for inner in values if isinstance(inner, torch.optim.Optimizer)]
    return found
