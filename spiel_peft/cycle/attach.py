"""Ties an optimizer to the deltas of a model, for those who want to be sure, and to say how long the run is."""

from __future__ import annotations

import torch
from torch import nn

from ..delta import AdapterRun, SparseDelta
from . import engine


def attach(optimizer: torch.optim.Optimizer, model: nn.Module, total_steps: int | None) -> list[AdapterRun]:
    """Check that `optimizer` steps deltas of `model`, and set the length of their runs.

    Args:
        optimizer: the innermost optimizer.
        model: any module that contains SpIEL layers.
        total_steps: optimizer steps of the run; None keeps what the config says.

    Returns:
        The runs of the adapters that the optimizer steps.

    Raises:
        ValueError: see above; nothing is changed then.
    """
    if total_steps is not None and (
        isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1
    ):
        raise ValueError(f"total_steps must be a positive int (optimizer steps of the run), got {total_steps!r}")
    ours = {id(module) for module in model.modules() if isinstance(module, SparseDelta)}
    held = [delta for delta, _ in engine.held_deltas(optimizer) if id(delta) in ours]
    if not held:
        raise ValueError(
            "the optimizer holds none of the model's SpIEL values: build it from the trainable parameters of the model "
            "after get_peft_model, e.g. AdamW(p for p in model.parameters() if p.requires_grad)"
        )
    for delta in held:
        delta.restore_dtype()
    runs = list({id(delta.run): delta.run for delta in held}.values())
    if total_steps is not None:
        for run in runs:
            run.total_steps = total_steps
    return runs
