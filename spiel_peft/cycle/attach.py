"""Ties an optimizer to the deltas of a model, for those who want to be sure, and to say how long the run is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..delta import AdapterRun, SparseDelta
from .engine import held_deltas
from .optimizer_check import check_optimizer
from .optimizer_state import carry
from .runs import begin_run, check_total_steps, owned_by_another, set_total_steps


def attach(optimizer: torch.optim.Optimizer, model: nn.Module, total_steps: int | None) -> list[AdapterRun]:
    """Check that `optimizer` steps deltas of `model`, and set the length of their runs.

    Args:
        optimizer: it may be wrapped.
        model: any module that contains SpIEL layers.
        total_steps: optimizer steps of the run; None keeps what the config says.

    Returns:
        The runs of the adapters that the optimizer steps.

    Raises:
        ValueError: see above; nothing is changed then.
        TypeError: the optimizer keeps state that cannot follow the indices, see `check_optimizer`.
    """
    check_total_steps(total_steps)
    optimizer = _unwrapped(optimizer)
    ours = {id(module) for module in model.modules() if isinstance(module, SparseDelta)}
    held = [delta for delta, _ in held_deltas(optimizer) if id(delta) in ours]
    if not held:
        raise ValueError(
            "the optimizer holds none of the model's SpIEL values: build it from the trainable parameters of the model "
            "after get_peft_model, e.g. AdamW(p for p in model.parameters() if p.requires_grad)"
        )
    check_optimizer(optimizer, held)
    carry(optimizer)
    for delta in held:
        delta.restore_dtype()
        if owned_by_another(delta, optimizer):
            begin_run(delta)
            set_total_steps(delta.run, delta.run.config.total_steps)
    attached = list({id(delta.run): delta.run for delta in held}.values())
    if total_steps is not None:
        for run in attached:
            set_total_steps(run, total_steps)
    return attached


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer in accelerate's and our own wrappers, which have no hooks; others around optimizers have."""
    while True:
        inner = getattr(optimizer, "optimizer", None) or getattr(optimizer, "base_optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer) or "_optimizer_step_post_hooks" in vars(optimizer):
            return optimizer
        optimizer = inner
