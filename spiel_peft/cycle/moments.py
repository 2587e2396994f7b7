"""Optimizer state across a close: permuted with the indices, seeded for what was grown.

A grown delta starts at zero with state that is neither stale nor zero where zero is harmful: a second moment of zero
would make its first update arbitrarily large.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .state_layout import buffers_of
from .state_rules import GrownSeeds, Past, rules_of, seeds_for


def permute(tensor: Tensor, source: Tensor, grown: Tensor | float) -> Tensor:
    """``[k]`` tensor after a close: slot j comes from slot source[j], or is ``grown[-1 - source[j]]``."""
    out = tensor.index_select(0, source.clamp(min=0))
    new = source < 0
    if not isinstance(grown, Tensor):
        return out.masked_fill_(new, grown)
    out[new] = grown.index_select(0, -1 - source[new]).to(out)
    return out


def reseed_states(
    optimizers: list[torch.optim.Optimizer], parameter: Tensor, source: Tensor, seeds: GrownSeeds | None
) -> None:
    """Bring what all optimizers that took part in a step keep for one delta's values in line with its new indices.

    An optimizer around another one may share its state, as sharpness-aware minimization does: that is changed once, by
    the rules of the inner one, whose state it is.

    Args:
        optimizers: the outermost first.
        parameter, source, seeds: see `reseed_state`.
    """
    owners = {id(optimizer.state.get(parameter)): optimizer for optimizer in optimizers}
    for optimizer in owners.values():
        reseed_state(optimizer, parameter, source, seeds)


def reseed_state(optimizer: torch.optim.Optimizer, parameter: Tensor, source: Tensor, seeds: GrownSeeds | None) -> None:
    """Bring the state of one delta's values in line with its new indices.

    Args:
        optimizer: the one that has just stepped `parameter`.
        parameter: the values ``[k]``.
        source: int64 ``[k]`` from `spiel_kernels.replace_positions`.
        seeds: window statistics of the grown positions, in the order `source` numbers them; None without a window.

    Raises:
        TypeError: see `spiel_peft.cycle.state_layout.buffers_of`; nothing was changed then.
    """
    buffers = buffers_of(optimizer, parameter)
    if not buffers:
        return
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    past = Past.of(group, optimizer.state[parameter], seeds.steps if seeds is not None else 0)
    for buffer in buffers:
        before = buffer.read()
        moves = source.to(before.device)
        rules = rules_of(optimizer, group, buffer.name, before)
        after = [
            permute(row, moves, seeds_for(rule, row, moves, past, seeds))
            for row, rule in zip(before, rules, strict=True)
        ]
        rows = torch.stack(after) if len(after) > 1 else after[0][None]
        buffer.write(rows, [rule.positive for rule in rules])
