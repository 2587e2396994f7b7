"""`SpIELOptimizer`, which attaches any optimizer to a model's cycle, and `SM3`, an optimizer with little state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spiel_kernels import sm3_accumulate_

from .cycle.close import accumulators
from .cycle.engine import attach, held_deltas


class SpIELOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer, checks that it trains the model's deltas, and sets the exact length of the run.

    The cycle runs on the steps of the wrapped optimizer, as it does without this class. Attaching an optimizer twice
    runs the cycle once.

    Args:
        base_optimizer: the optimizer of the model's trainable parameters.
        model: the adapted model.
        total_steps: optimizer steps of the run; replaces the config's `total_steps`.

    Raises:
        TypeError: `base_optimizer` is no `torch.optim.Optimizer`.
        ValueError: `base_optimizer` holds no values of the model's deltas, or `total_steps` is no positive int.
    """

    # The hooks of the cycle act on the wrapped optimizer's step and ignore this one.
    delegates_step = True

    def __init__(
        self, base_optimizer: torch.optim.Optimizer, model: nn.Module, *, total_steps: int | None = None
    ) -> None:
        if not isinstance(base_optimizer, torch.optim.Optimizer):
            raise TypeError(f"base_optimizer must be a torch.optim.Optimizer, got {type(base_optimizer).__name__}")
        attach(base_optimizer, model, total_steps)
        # Typed as Any because a GradScaler adds attributes to it that PyTorch does not declare.
        self.base_optimizer: Any = base_optimizer
        # `super().__init__` is not called: it would make a second set of groups, state and step hooks. The properties
        # below pass on those of the wrapped optimizer.

    def __getattr__(self, name: str) -> Any:
        # Methods of `torch.optim.Optimizer` read attributes that its `__init__` creates, such as hook dictionaries.
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

    # A GradScaler sets these two on optimizers that unscale gradients in their own kernel.

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


class SM3(torch.optim.Optimizer):
    """SM3-II (Anil, Gupta, Koren and Singer, 2019): adaptive steps with one number per row and column of a matrix.

    For a sparse delta, ``nu = min(row, col) + g**2`` at its positions; afterwards the row and column accumulators are
    the maxima of nu. They belong to the delta and not to this optimizer, are shared with momentum growth (SpIEL-MA),
    and stay the same at a close. Any other parameter has one accumulator for each index of each of its dimensions.

    The update is ``u = g / (sqrt(nu) + eps)``, or with momentum ``m``, where ``m <- beta * m + (1 - beta) * u``. Weight
    decay is decoupled: ``p <- p * (1 - lr * weight_decay) - lr * u``.

    Args:
        params: parameters or groups.
        lr: learning rate, at least 0.
        momentum: beta in [0, 1).
        weight_decay: decoupled weight decay, at least 0.
        eps: added to the denominator, above 0.

    Raises:
        ValueError: a setting is out of range.
    """

    # The cycle does not update the accumulators of deltas that this optimizer steps.
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
        """Perform one step. If `closure` is given, it recomputes the loss with gradients enabled; returns the loss."""
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
    """Update the SM3-II accumulators of a dense tensor, one per index of each dimension; returns nu.

    Args:
        state: the optimizer's state of the parameter, in which the accumulators are created and updated.
        gradient: the gradient of the parameter, of any shape.

    Returns:
        nu in the gradient's shape, in float32 or wider.
    """
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
