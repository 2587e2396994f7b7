"""`SpIELOptimizer`: any optimizer, tied to a model's SpIEL adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..cycle.attach import attach


class SpIELOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer and checks that it trains the model's deltas; sets the exact length of the run.

    The cycle itself runs on the wrapped optimizer's step, as it does without this class: attaching twice runs it
    once.

    Args:
        base_optimizer: the optimizer that steps the model's trainable parameters.
        model: the adapted model.
        total_steps: optimizer steps of the run; overrides the config's.

    Raises:
        TypeError: `base_optimizer` is no `torch.optim.Optimizer`.
        ValueError: it holds no values of the model's SpIEL deltas, or `total_steps` is not a positive int.
    """

    # The engine's hooks act on the wrapped optimizer, not on this one.
    delegates_step = True

    def __init__(
        self, base_optimizer: torch.optim.Optimizer, model: nn.Module, *, total_steps: int | None = None
    ) -> None:
        if not isinstance(base_optimizer, torch.optim.Optimizer):
            raise TypeError(f"base_optimizer must be a torch.optim.Optimizer, got {type(base_optimizer).__name__}")
        attach(base_optimizer, model, total_steps)
        # Any: a GradScaler hangs attributes on it that torch does not declare.
        self.base_optimizer: Any = base_optimizer
        # Not super().__init__: groups, state and defaults are those of the wrapped optimizer, looked up every time, and
        # its step runs the hooks.

    def __getattr__(self, name: str) -> Any:
        # Hook dictionaries and the like that torch's own Optimizer methods expect to find.
        if name == "base_optimizer":
            raise AttributeError(name)
        return getattr(self.base_optimizer, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    # What a GradScaler tells an optimizer that unscales in its own kernel.

    @property
    def grad_scale(self) -> Any:
        return self.base_optimizer.grad_scale

    @grad_scale.setter
    def grad_scale(self, scale: Any) -> None:
        self.base_optimizer.grad_scale = scale

    @grad_scale.deleter
    def grad_scale(self) -> None:
        del self.base_optimizer.grad_scale

    @property
    def found_inf(self) -> Any:
        return self.base_optimizer.found_inf

    @found_inf.setter
    def found_inf(self, found: Any) -> None:
        self.base_optimizer.found_inf = found

    @found_inf.deleter
    def found_inf(self) -> None:
        del self.base_optimizer.found_inf

    def __getstate__(self) -> dict[str, Any]:
        return {"base_optimizer": self.base_optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the wrapped optimizer."""
        return self.base_optimizer.step() if closure is None else self.base_optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base_optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base_optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base_optimizer.add_param_group(param_group)

    def __repr__(self) -> str:
        return f"SpIELOptimizer({self.base_optimizer!r})"
