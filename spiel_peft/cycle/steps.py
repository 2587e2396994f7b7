"""Finds out which optimizers take part in a step, which gradients it is given, and whether it counts."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spiel_kernels import sm3_accumulate_

from ..call_stack import optimizers_without_hooks, running_steps
from ..delta import SparseDelta
from ..growth import get_growth_criterion
from .close import accumulators

# Optimizers that step other optimizers (sharpness-aware minimization, Lookahead, ZeroRedundancyOptimizer) fire the step
# hooks of both. Only the outermost step counts as a training step; the state of all optimizers follows the indices.


_Reference = weakref.ref[torch.optim.Optimizer]


@dataclass(eq=False)
class _OpenStep:
    """A step in progress.

    Attributes:
        optimizer: the outermost optimizer.
        parameters: ids of the deltas' values that it holds.
        depth: running `step` methods of this optimizer; a subclass may call the one of its base class.
        parts: the optimizers that it has stepped.
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
    """Note that a step begins, and return whether it is a step of its own, not part of another one.

    Args:
        optimizer: about to step.
        parameters: ids of the deltas' values that it holds.
    """
    if _OPEN.stack:
        # Steps that an exception has ended are not on the call stack any more; the one that begins is.
        running = running_steps()
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
    """Note that a step has ended, and return the optimizers that took part in it, the outer ones first.

    The list is empty if the step was part of another one, or if the optimizer held no delta when it began.
    """
    for step in _OPEN.stack:
        if step.optimizer() is optimizer:
            step.depth -= 1
            if step.depth:
                return []
            _OPEN.stack.remove(step)
            parts = [part() for part in step.parts]
            took_part = [optimizer, *dict.fromkeys(part for part in parts if part is not None)]
            return [*optimizers_without_hooks({id(part) for part in took_part}), *took_part]
        if any(part() is optimizer for part in step.parts):
            return []
    return []


def inner_optimizers(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.optim.Optimizer]]:
    """The optimizers among an optimizer's attributes, lists and dicts included, each with the attribute's name."""
    found = []
    for name, value in vars(optimizer).items():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        found += [(name, inner) for inner in values if isinstance(inner, torch.optim.Optimizer)]
    return found


# Gradients are noted before the step, because some optimizers write into them: SGD with Nesterov momentum in its
# foreach version, which is the default on a GPU, and Schedule-Free.


def when_known(note: Callable[[bool], None], args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """Call `note` when the gradient of a step is known: now, or whenever the step has evaluated its closure.

    Args:
        note: gets True in its first call of this step; a closure may be evaluated several times.
        args, kwargs: of the optimizer's `step`, itself included.

    Returns:
        The arguments that `step` has to be called with instead, None if they stay the same.
    """
    closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
    if not callable(closure):
        note(True)
        return None
    evaluations = 0

    @functools.wraps(closure)
    def noting(*closure_args: Any, **closure_kwargs: Any) -> Any:
        nonlocal evaluations
        loss = closure(*closure_args, **closure_kwargs)
        note(evaluations == 0)
        evaluations += 1
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": noting}
    return (args[0], noting, *args[2:]), kwargs


def note_gradients(optimizer: torch.optim.Optimizer, deltas: list[SparseDelta], first: bool) -> None:
    """Keep the parts of the deltas' gradients that the cycle needs, before an optimizer writes to them.

    Fused optimizers get the scaled gradient and unscale it in place, so theirs is read after the step. SM3
    accumulators are also updated after the step if the optimizer steps others. Waits for no device.

    Args:
        optimizer: about to step the deltas.
        deltas: of any adapters.
        first: whether these are the first gradients of the step. A closure that is evaluated again has moved the
            weights, so only the first gradients are accumulated.
    """
    unscales = getattr(optimizer, "grad_scale", None) is not None
    accumulates = not (unscales or optimizer_accumulates(optimizer) or inner_optimizers(optimizer))
    for delta in deltas:
        current, grad = delta.state.current, delta.values.grad
        known = not unscales and grad is not None and current.probe is not None
        current.seen = grad.detach()[current.probe] if known else None
        current.accumulated = accumulates and not first
    if not accumulates or not first:
        return
    with torch.no_grad():
        for run in {delta.run: None for delta in deltas if delta.values.grad is not None}:
            if get_growth_criterion(run.config.growth).accumulates:
                _accumulate(optimizer, [d for d in deltas if d.run is run and d.values.grad is not None])


def _accumulate(optimizer: torch.optim.Optimizer, deltas: list[SparseDelta]) -> None:
    takes_place = will_take_place([optimizer], [delta.values.grad for delta in deltas])
    for delta in deltas:
        row, col = accumulators(delta)
        grad = delta.values.grad.to(row.dtype)
        # A gradient of zero leaves the accumulators as they are.
        sm3_accumulate_(row, col, delta.indices, torch.where(takes_place.to(grad.device), grad, 0.0))
        delta.state.current.accumulated = True


def accumulate_after_step(optimizers: list[torch.optim.Optimizer], delta: SparseDelta) -> None:
    """Update the SM3 accumulators, unless that was done before the step or the optimizer does it."""
    grad = delta.values.grad
    if grad is None or delta.state.current.accumulated or any(map(optimizer_accumulates, optimizers)):
        return
    if get_growth_criterion(delta.run.config.growth).accumulates:
        row, col = accumulators(delta)
        sm3_accumulate_(row, col, delta.indices, grad.to(row.dtype))


def optimizer_accumulates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer updates the deltas' SM3 accumulators in its own step."""
    return bool(getattr(optimizer, "updates_spiel_accumulators", False))


def will_take_place(optimizers: list[torch.optim.Optimizer], grads: list[Tensor]) -> Tensor:
    """Whether a step with these gradients counts, as a bool on their device.

    It counts if they are finite and no gradient scaler has found others that are not.
    """
    sums = [grad.detach().sum(dtype=torch.float64) for grad in grads]
    finite = torch.isfinite(torch.stack([total.to(sums[0].device) for total in sums])).all()
    for optimizer in optimizers:
        # A fused optimizer fires its hooks also in a step that it skips for an overflow in any parameter.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            finite = finite & (torch.as_tensor(found_inf).to(finite.device) == 0).all()
    return finite


def any_nonzero(tensors: Sequence[Tensor]) -> bool:
    """Whether any of the tensors has an entry other than zero; one wait for the device. At least one tensor.

    A rank looks only at its own part of a sharded tensor.
    """
    parts = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return bool(torch.stack([part.detach().any().to(parts[0].device) for part in parts]).any())


def gradient_at_probes(delta: SparseDelta) -> Tensor | None:
    """The gradient that the step was given at the slots `probe`, ``[p]``; None if nothing was gathered for the step."""
    current, grad = delta.state.current, delta.values.grad
    if grad is None or current.probe is None or current.probe_sums is None:
        return None
    return grad[current.probe] if current.seen is None else current.seen
