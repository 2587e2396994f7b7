"""Optimizers whose state cannot follow a change of indices, each for another reason."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Keeping(torch.optim.Optimizer):
    """Sign descent that keeps, for no purpose, what `kept` makes of a parameter."""

    def __init__(self, params: Iterable[Any], lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    def kept(self, parameter: Tensor) -> Any:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].setdefault("history", self.kept(p))
                    p.sub_(p.grad.sign(), alpha=group["lr"])


class Sliced(Keeping):
    """Of every eleventh entry only, as Prodigy does to save memory."""

    def kept(self, parameter: Tensor) -> Tensor:
        return torch.zeros_like(parameter)[::11]


class Preconditioned(Keeping):
    """A small matrix per parameter."""

    def kept(self, parameter: Tensor) -> Tensor:
        return torch.zeros(2, parameter.numel() // 4)


class Listed(Keeping):
    """The last gradients."""

    def kept(self, parameter: Tensor) -> list[Tensor]:
        return [torch.zeros_like(parameter)]


class Coded(Keeping):
    """A quantizer that nobody knows."""

    def kept(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"codes": torch.zeros(parameter.shape, dtype=torch.int8), "scales": torch.ones(parameter.numel() // 4)}


class InBackward(torch.optim.Optimizer):
    """Steps in hooks while the backward pass runs, as LOMO does; has no `step` of its own."""

    def __init__(self, params: Iterable[Any], lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})


class Offloaded(torch.optim.Optimizer):
    """Keeps copies of the parameters elsewhere, each with an optimizer of its own, as torchao's offloading does."""

    def __init__(self, params: Iterable[Any], lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})
        self.copies = {p: nn.Parameter(p.detach().clone()) for p in self.param_groups[0]["params"]}
        self.inner = {p: torch.optim.AdamW([copy], lr=lr) for p, copy in self.copies.items()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p, copy in self.copies.items():
            if p.grad is not None:
                copy.grad = p.grad.clone()
                self.inner[p].step()
                p.copy_(copy)


BY_STATE: list[type[Keeping]] = [Sliced, Preconditioned, Listed, Coded]
