"""Optimizers whose state cannot follow a change of indices, for different reasons."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Keeping(torch.optim.Optimizer):
    """Sign descent whose state is what `kept` computes from a parameter."""

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
    """State of every eleventh entry only, as Prodigy has it to save memory."""

    def kept(self, parameter: Tensor) -> Tensor:
        return torch.zeros_like(parameter)[::11]


class Preconditioned(Keeping):
    """State that is a small matrix per parameter."""

    def kept(self, parameter: Tensor) -> Tensor:
        return torch.zeros(2, parameter.numel() // 4)


class Listed(Keeping):
    """State that is a list of the last gradients."""

    def kept(self, parameter: Tensor) -> list[Tensor]:
        return [torch.zeros_like(parameter)]


class Coded(Keeping):
    """State with an unknown quantizer."""

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
