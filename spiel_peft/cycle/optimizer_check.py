"""Refuses optimizers whose state cannot follow the indices.

Optimizers make their state in their first step, so most of it can be looked at only after that: at the first close,
before the close changes anything.
"""

from __future__ import annotations

import inspect
import weakref

import torch
from torch import Tensor

from ..delta import SparseDelta
from .growth_registry import get_growth_criterion
from .nested_steps import inner_optimizers
from .state_layout import buffers_of

_CHECKED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def check_optimizer(optimizer: torch.optim.Optimizer, deltas: list[SparseDelta]) -> None:
    """Refuse an optimizer whose state cannot follow a change of indices, as far as can be known before it steps.

    Called before every step; looks once at each optimizer.

    Raises:
        TypeError: names the optimizer and what it keeps; nothing was changed then.
    """
    if optimizer in _CHECKED:
        return
    moving = [delta for delta in deltas if get_growth_criterion(delta.run.config.growth).propose is not None]
    if not moving:
        return
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            f"{name} keeps state 'old_dirs', one history of all parameters together. SpIEL cannot permute that with "
            "the indices; use another optimizer, or growth='none'"
        )
    if inspect.unwrap(type(optimizer).step) is inspect.unwrap(torch.optim.Optimizer.step):
        raise TypeError(
            f"{name} has no step of its own: it updates parameters while the backward pass runs, and SpIEL's cycle "
            "acts at steps; use another optimizer, or growth='none'"
        )
    for delta in moving:
        buffers_of(optimizer, delta.values)
    _CHECKED.add(optimizer)


def check_state(optimizers: list[torch.optim.Optimizer], parameter: Tensor) -> None:
    """Refuse what the optimizers that took part in a step keep for `parameter`, if it cannot follow the indices.

    Raises:
        TypeError: see above.
    """
    kept = [buffers_of(optimizer, parameter) for optimizer in optimizers]
    for optimizer in optimizers:
        _check_for_entries_elsewhere(optimizer, parameter)
    if not any(kept):
        for optimizer in optimizers:
            _check_for_hidden_state(optimizer, optimizers)


def _check_for_hidden_state(optimizer: torch.optim.Optimizer, took_part: list[torch.optim.Optimizer]) -> None:
    """An optimizer that keeps nothing here may keep it in others, for copies of the parameters."""
    inside = inner_optimizers(optimizer)
    if inside and not any(inner is other for _, inner in inside for other in took_part):
        name, inner = inside[0]
        raise TypeError(
            f"{type(optimizer).__name__} keeps its state in other optimizers ({name!r}: {type(inner).__name__}), "
            "where SpIEL cannot permute it with the indices; use another optimizer, or growth='none'"
        )


def _check_for_entries_elsewhere(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """State is by parameter; some keep more of it under names, such as a dict of tensors by parameter."""
    for name, entry in optimizer.state.items():
        if isinstance(name, Tensor) or not isinstance(entry, dict):
            continue
        kept = next((value for key, value in entry.items() if key is parameter), None)
        if isinstance(kept, Tensor) and kept.numel() > 1:
            raise TypeError(
                f"{type(optimizer).__name__} keeps state {name!r} for all parameters together, with a tensor for each "
                "of them. SpIEL cannot permute that with the indices; use another optimizer, or growth='none'"
            )
