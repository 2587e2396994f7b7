"""Whether an optimizer's state can follow the indices, told before it takes its first step with them.

Optimizers make their state in their first step, so there is nothing to look at when one is attached. What torch,
transformers, bitsandbytes and torchao keep is known; of any other class a second optimizer with the same settings
steps a small parameter of its own, and what it keeps for that is looked at.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..delta import SparseDelta
from .growth_registry import get_growth_criterion
from .nested_steps import inner_optimizers
from .state_layout import buffers_of

_KNOWN_PACKAGES = ("torch", "transformers", "bitsandbytes", "torchao", "spiel_peft")
_CHECKED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
# First small, as preconditioners take cubic time. Then more than optimizers take for too small to be quantized, and a
# multiple of their block sizes.
_REHEARSAL_SIZES = (64, 8192)
_REHEARSAL_STEPS = 2


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
    if type(optimizer).__module__.partition(".")[0] not in _KNOWN_PACKAGES:
        _rehearse(optimizer, moving[0].values)
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


def _rehearse(optimizer: torch.optim.Optimizer, like: Tensor) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return  # its step may communicate, and not all ranks come here together
    settings = _settings_of(optimizer, like)
    if settings is None:
        return
    for size in _REHEARSAL_SIZES:
        probe = nn.Parameter(torch.zeros(size, dtype=like.dtype, device=like.device))
        devices = [like.device] if like.device.type == "cuda" else []
        with warnings.catch_warnings(), torch.random.fork_rng(devices=devices):
            warnings.simplefilter("ignore")
            try:
                twin = type(optimizer)([probe], **settings)
                for sign in [1.0, -1.0] * (_REHEARSAL_STEPS // 2):
                    probe.grad = torch.linspace(-sign, sign, size, dtype=like.dtype, device=like.device)
                    twin.step()
            except Exception:
                return  # it wants to be called otherwise: its state is looked at before the first close
        buffers_of(twin, probe)
        _check_for_entries_elsewhere(twin, probe)


def _settings_of(optimizer: torch.optim.Optimizer, like: Tensor) -> dict[str, Any] | None:
    """Arguments that make another optimizer of the same kind; None if they cannot be found out."""
    group = next(g for g in optimizer.param_groups if any(p is like for p in g["params"]))
    parameters = list(inspect.signature(type(optimizer).__init__).parameters.values())[2:]
    settings: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            return None
        if parameter.kind is parameter.VAR_KEYWORD:
            # Passed on to a base class, or ignored. What nobody takes fails, and so tells nothing.
            settings |= {name: value for name, value in group.items() if name not in ("params", *settings)}
        elif parameter.name in group:
            settings[parameter.name] = group[parameter.name]
        elif hasattr(optimizer, parameter.name):
            settings[parameter.name] = getattr(optimizer, parameter.name)
        else:
            return None
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in settings.items()}
