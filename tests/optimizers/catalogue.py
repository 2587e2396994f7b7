"""Optimizers that the tests train deltas with, published and made-up ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import Adafactor

from spiel_peft import SM3

Make = Callable[..., torch.optim.Optimizer]
Params = Iterable[Any]


class Inherited(torch.optim.AdamW):
    """A user's own version of a known optimizer."""


def evaluate(closure: Callable[[], Any] | None) -> None:
    if closure is not None:
        with torch.enable_grad():
            closure()


class SignedMean(torch.optim.Optimizer):
    """Steps by the mean gradient's sign: an average, a magnitude per entry, a count per entry, and a scalar."""

    def __init__(self, params: Params, lr: float = 0.01, decay: float = 0.7) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        evaluate(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(drift=torch.zeros_like(p), magnitude=torch.zeros_like(p), total=torch.zeros(()))
                    state["age"] = torch.zeros(p.shape, dtype=torch.int64)
                state["drift"].lerp_(p.grad, 1 - group["decay"])
                state["magnitude"].lerp_(p.grad.abs(), 1 - group["decay"])
                state["total"] += p.grad.norm()
                state["age"] += 1
                p.sub_(state["drift"] / (state["magnitude"] + 1e-12), alpha=group["lr"])


class TwoIterates(torch.optim.Optimizer):
    """Schedule-Free AdamW in its essentials: the parameter is a mix of two iterates, steps are counted in the group."""

    def __init__(self, params: Params, lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "k": 0, "weight_sum": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        evaluate(closure)
        for group in self.param_groups:
            first, second = group["betas"]
            group["k"] += 1
            group["weight_sum"] += 1.0
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(z=p.detach().clone(), exp_avg_sq=torch.zeros_like(p))
                state["exp_avg_sq"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                root = (state["exp_avg_sq"] / (1 - second ** group["k"])).sqrt_().add_(1e-8)
                # Schedule-Free too writes into the gradient.
                p.grad.div_(root)
                weight = 1 / group["weight_sum"]
                p.lerp_(state["z"], weight)
                p.add_(p.grad, alpha=group["lr"] * (first * (1 - weight) - 1))
                state["z"].sub_(p.grad, alpha=group["lr"])


class LionWithoutStep(torch.optim.Optimizer):
    """Lion without a step count."""

    def __init__(self, params: Params, lr: float = 0.003, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        evaluate(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                mixed = state["exp_avg"].lerp(p.grad, 1 - group["betas"][0])
                p.sub_(mixed.sign(), alpha=group["lr"])
                state["exp_avg"].lerp_(p.grad, 1 - group["betas"][1])


def _of(kind: type[Any], **settings: Any) -> Make:
    return lambda params, **more: kind(params, **{**settings, **more})


# All of these work in float64.
TORCH: dict[str, Make] = {
    "adamw": _of(torch.optim.AdamW, lr=0.02, foreach=False),
    "adamw-foreach": _of(torch.optim.AdamW, lr=0.02, foreach=True),
    "adamw-fused": _of(torch.optim.AdamW, lr=0.02, fused=True),
    "adamw-amsgrad": _of(torch.optim.AdamW, lr=0.02, amsgrad=True),
    "adamw-maximize": _of(torch.optim.AdamW, lr=0.02, maximize=True),
    "adamw-tensor-lr": lambda params, **more: torch.optim.AdamW(
        params, **{"lr": torch.tensor(0.02), "foreach": False, **more}
    ),
    "adam-decay": _of(torch.optim.Adam, lr=0.02, weight_decay=0.1),
    "nadam": _of(torch.optim.NAdam, lr=0.02),
    "nadam-foreach": _of(torch.optim.NAdam, lr=0.02, foreach=True),
    "radam": _of(torch.optim.RAdam, lr=0.02),
    "adamax": _of(torch.optim.Adamax, lr=0.02, eps=1e-16),
    "adamax-foreach": _of(torch.optim.Adamax, lr=0.02, eps=1e-16, foreach=True),
    "sgd": _of(torch.optim.SGD, lr=0.05),
    "sgd-momentum": _of(torch.optim.SGD, lr=0.05, momentum=0.9),
    "sgd-dampening": _of(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "sgd-nesterov": _of(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "sgd-maximize": _of(torch.optim.SGD, lr=0.05, momentum=0.8, maximize=True),
    "sgd-fused": _of(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "adagrad": _of(torch.optim.Adagrad, lr=0.05),
    "adagrad-foreach": _of(torch.optim.Adagrad, lr=0.05, foreach=True, initial_accumulator_value=0.01),
    "adadelta": _of(torch.optim.Adadelta, lr=1.0),
    "rmsprop": _of(torch.optim.RMSprop, lr=0.01),
    "rmsprop-centered": _of(torch.optim.RMSprop, lr=0.01, centered=True, momentum=0.5),
    "rprop": _of(torch.optim.Rprop, lr=0.01),
    "rprop-foreach": _of(torch.optim.Rprop, lr=0.01, foreach=True),
    "asgd": _of(torch.optim.ASGD, lr=0.05, t0=3),
    "adafactor": _of(torch.optim.Adafactor, lr=0.05),
}
OTHERS: dict[str, Make] = {
    "transformers-adafactor": _of(Adafactor, lr=0.01, relative_step=False, scale_parameter=False),
    "transformers-adafactor-beta1": _of(Adafactor, lr=0.01, relative_step=False, scale_parameter=False, beta1=0.9),
    "transformers-adafactor-own-lr": _of(Adafactor),
    "inherited": _of(Inherited, lr=0.02),
    "signed-mean": SignedMean,
    "two-iterates": TwoIterates,
    "lion-without-step": LionWithoutStep,
}
SHARED: dict[str, Make] = {"sm3": _of(SM3, lr=0.05), "sm3-momentum": _of(SM3, lr=0.05, momentum=0.9)}
# In 32 bits: these matrices are small.
BITSANDBYTES: dict[str, Make] = {
    "bnb-adamw": _of(bnb.optim.AdamW8bit, lr=0.02),
    "bnb-paged-adamw": _of(bnb.optim.PagedAdamW8bit, lr=0.02),
    "bnb-paged-adamw-32": _of(bnb.optim.PagedAdamW, lr=0.02),
    "bnb-lion": _of(bnb.optim.Lion, lr=0.003),
    "bnb-ademamix": _of(bnb.optim.AdEMAMix, lr=0.02),
    "bnb-ademamix-scheduled": _of(bnb.optim.AdEMAMix, lr=0.02, t_alpha=8, t_beta3=8),
    "bnb-sgd": _of(bnb.optim.SGD, lr=0.05, momentum=0.9),
    "bnb-rmsprop": _of(bnb.optim.RMSprop, lr=0.01),
    "bnb-adagrad": _of(bnb.optim.Adagrad, lr=0.05),
}
EVERY: dict[str, Make] = {**TORCH, **OTHERS, **BITSANDBYTES}


def per_entry(state: dict[str, Any], k: int) -> dict[str, Tensor]:
    """The buffers of a state that have a value per entry, as ``[rows, k]``."""
    return {
        name: tensor.view(-1, k)
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[-1] == k
    }


def parameter_like(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone())
