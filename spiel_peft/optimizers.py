"""`SpIELOptimizer`, which ties any optimizer to a model's SpIEL adapter, and `SM3`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spiel_kernels import sm3_accumulate_

from .cycle.close import accumulators
from .cycle.engine import attach, held_deltas


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


# SM3 (Anil, Gupta, Koren and Singer, 2019, algorithm SM3-II) for sparse deltas.


class SM3(torch.optim.Optimizer):
    """Adaptive steps with O(rows + cols) state per matrix instead of one or two numbers per delta.

    For a sparse delta, ``nu = min(row, col) + g**2`` at its active positions; row and column accumulators then take
    the maxima of nu. They live with the delta, are shared with momentum growth (SpIEL-MA) and need no care at a
    close. A parameter that is no delta gets one accumulator per index of each of its dimensions.

    Update: ``u = g / (sqrt(nu) + eps)``; with momentum ``m = beta * m + (1 - beta) * u`` takes its place; weight decay
    is decoupled: ``p <- p * (1 - lr * weight_decay) - lr * u``.

    Args:
        params: parameters or groups.
        lr: learning rate, at least 0.
        momentum: beta in [0, 1).
        weight_decay: decoupled weight decay, at least 0.
        eps: added to the denominator, above 0.

    Raises:
        ValueError: a setting is out of range.
    """

    # The engine leaves the accumulators of deltas to this optimizer.
    updates_spiel_accumulators = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        if not lr >= 0.0:
            raise ValueError(f"lr must be at least 0, got {lr}; 1e-3 to 1e-1 are usual for SM3")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}; 0.9 is usual, 0 saves its buffer")
        if not weight_decay >= 0.0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}; 0 turns it off")
        if not eps > 0.0:
            raise ValueError(f"eps must be above 0, got {eps}; 1e-8 is the default")
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eps=eps))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step; `closure`, if given, recomputes the loss and is run with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        deltas = {id(delta.values): delta for delta, _ in held_deltas(self)}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                delta = deltas.get(id(parameter))
                if delta is not None:
                    row, col = accumulators(delta)
                    nu = sm3_accumulate_(row, col, delta.indices, gradient)
                else:
                    nu = _dense_accumulate_(self.state[parameter], gradient)
                self._update(parameter, gradient, nu, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, nu: Tensor, group: dict[str, Any]) -> None:
        update = gradient.to(nu.dtype) / (nu.sqrt() + group["eps"])
        beta = group["momentum"]
        if beta:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(update)
            update = state["momentum_buffer"].mul_(beta).add_(update, alpha=1 - beta)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.to(parameter.dtype), alpha=-group["lr"])


def _dense_accumulate_(state: dict[str, Any], gradient: Tensor) -> Tensor:
    """SM3-II on a dense tensor, covered by the slices of each dimension; returns nu in the gradient's shape."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if wide.dim() == 0:
        wide = wide.reshape(1)
    for dim, size in enumerate(wide.shape):
        if f"accumulator_{dim}" not in state:
            state[f"accumulator_{dim}"] = torch.zeros(size, dtype=wide.dtype, device=wide.device)
    nu = torch.full_like(wide, float("inf"))
    for dim in range(wide.dim()):
        shape = [-1 if d == dim else 1 for d in range(wide.dim())]
        nu = torch.minimum(nu, state[f"accumulator_{dim}"].view(shape))
    nu = nu + wide.square()
    for dim in range(wide.dim()):
        others = [d for d in range(wide.dim()) if d != dim]
        state[f"accumulator_{dim}"].copy_(nu.amax(others) if others else nu)
    return nu.reshape(gradient.shape)


# Optimizers: SM3 for sparse deltas, and a wrapper that ties any optimizer to a model's cycle.
