"""Optimizers that wrap others, and steps that call steps, as published optimizers do."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import torch


@torch.no_grad()
def look_ahead(optimizer: Any) -> None:
    """Parameters and where they were before meet halfway."""
    optimizer.inner.step()
    for group in optimizer.param_groups:
        for p in group["params"]:
            slow = optimizer.state[p].setdefault("slow", torch.zeros_like(p))
            slow.lerp_(p, 0.5)
            p.copy_(slow)


class Lookahead(torch.optim.Optimizer):
    """Lookahead that shares the parameter groups of the inner optimizer."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self, closure: Any = None) -> None:
        look_ahead(self)


class WithoutHooks(torch.optim.Optimizer):
    """Lookahead that does not call the constructor of its base class, and so has no hooks."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.defaults = inner, inner.param_groups, {}
        self.state = defaultdict(dict)

    def step(self, closure: Any = None) -> None:
        look_ahead(self)


class HooksOfSteps(torch.optim.Optimizer):
    """Lookahead with step hooks only and groups as a property, as pytorch_optimizer's wrappers have them."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.defaults = inner, {}
        self.state = defaultdict(dict)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._patch_step_function()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def step(self, closure: Any = None) -> None:
        look_ahead(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        kept = [self.state[p] for group in self.param_groups for p in group["params"]]
        return {"slow": kept, "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict["inner"])
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.state |= dict(zip(parameters, state_dict["slow"], strict=True))


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimization: the gradient at a point uphill steps from where the parameters were."""

    def __init__(self, inner: torch.optim.Optimizer, rho: float = 0.05) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {"rho": rho})
        self.inner, self.param_groups = inner, inner.param_groups
        self.rho = rho

    @torch.no_grad()
    def step(self, closure: Any) -> None:
        with torch.enable_grad():
            closure()
        moved = []
        for group in self.param_groups:
            for p in group["params"]:
                uphill = p.grad * (self.rho / (p.grad.norm() + 1e-12))
                p.add_(uphill)
                moved.append((p, uphill))
        with torch.enable_grad():
            closure()
        for p, uphill in moved:
            p.sub_(uphill)
        self.inner.step()


class Twice(torch.optim.SGD):
    """Evaluates its closure twice and steps by what it found last."""

    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            closure()
            closure()
        super().step()


class OnTop(torch.optim.AdamW):
    """Calls the step of its base class, which has hooks of its own, and does something before and after."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.999)
        return loss


class Stubborn(torch.optim.AdamW):
    """Tries its base class's step again if that fails."""

    failures = 1

    def step(self, closure: Any = None) -> Any:
        for attempt in range(2):
            try:
                return super().step(closure)
            except RuntimeError:
                assert attempt == 0

    def _init_group(self, *args: Any, **kwargs: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("not yet")
        return super()._init_group(*args, **kwargs)


class Several(torch.optim.Optimizer):
    """Passes some parameters to one optimizer and the rest to another; has no state itself."""

    def __init__(self, *inner: torch.optim.Optimizer) -> None:
        super().__init__([p for each in inner for group in each.param_groups for p in group["params"]], {})
        self.inner = list(inner)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for each in self.inner:
            each.step()


class SharedState(Sharpness):
    """Sharpness-aware minimization that shares one state with the inner optimizer, as usual implementations do."""

    def __init__(self, inner: torch.optim.Optimizer, rho: float = 0.05) -> None:
        super().__init__(inner, rho)
        self.state = inner.state
