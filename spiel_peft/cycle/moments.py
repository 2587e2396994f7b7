"""Optimizer state across a close: permuted with the indices, seeded for what was grown.

A grown delta starts at zero with state that is neither stale nor zero where zero is harmful: a second moment of zero
would make its first update arbitrarily large. Seeds come from the window's gradients, scaled by the optimizer's
current bias correction, so that the corrected estimate is unbiased although `step` is kept per tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "exp_avg_fast", "exp_avg_slow", "m1", "m2", "state1")
SECOND_MOMENTS = (
    "exp_avg_sq",
    "max_exp_avg_sq",
    "square_avg",
    "variance",
    "exp_inf",
    "nu",
    "state2",
)
# Corrections to something else, not moments of the gradient: a grown delta has none yet.
ZERO_SEEDED = ("prev", "grad_avg", "ax")
# bitsandbytes optimizers whose first state is a second moment
_SECOND_FIRST = ("rmsprop", "adagrad")
_QUANT_BLOCK = 256


@dataclass(frozen=True)
class GrownSeeds:
    """Window statistics of the grown positions.

    Attributes:
        mean: mean gradient per step ``[m]``; NaN where a position was not in the window.
        mean_square: mean squared gradient per step ``[m]``; NaN likewise.
    """

    mean: Tensor
    mean_square: Tensor


def permute(tensor: Tensor, source: Tensor, grown: Tensor | float) -> Tensor:
    """``[k]`` tensor after a close: slot j comes from slot source[j], or is ``grown[-1 - source[j]]``."""
    out = tensor[source.clamp(min=0)]
    new = source < 0
    out[new] = (grown[-1 - source[new]] if isinstance(grown, Tensor) else torch.tensor(grown)).to(out)
    return out


def check_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Raise a TypeError if the optimizer keeps per-entry state that cannot be permuted with the indices."""
    size = parameter.numel()
    state = optimizer.state.get(parameter, {})
    for name, entry in state.items():
        if size < 2 or name.startswith(("qmap", "absmax")):
            continue
        if isinstance(entry, Tensor):
            quantized = entry.dtype == torch.uint8 and f"qmap{name.removeprefix('state')}" in state
            known = entry.shape == parameter.shape and (quantized or entry.dtype != torch.uint8)
            bad: list[Any] = [] if known else [entry]
        else:
            bad = list(entry) if isinstance(entry, (list, tuple)) else []
        shapes = [tuple(tensor.shape) for tensor in bad if isinstance(tensor, Tensor) and tensor.numel() >= size]
        if shapes:
            raise TypeError(
                f"{type(optimizer).__name__} keeps state {name!r} of shape {shapes[0]} for {size} deltas, which SpIEL "
                "cannot permute with the indices; use another optimizer or growth='none'"
            )


def reseed_state(optimizer: torch.optim.Optimizer, parameter: Tensor, source: Tensor, seeds: GrownSeeds | None) -> None:
    """Bring the state of one delta's values in line with its new indices.

    Args:
        optimizer: the one that has just stepped `parameter`.
        parameter: the values ``[k]``.
        source: int64 ``[k]`` from `spiel_kernels.replace_positions`.
        seeds: window statistics of the grown positions, in the order `source` numbers them; None without a window.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    for name in [n for n, t in state.items() if isinstance(t, Tensor) and t.shape == parameter.shape and t.dim()]:
        tensor = state[name]
        if name == "step":
            continue
        if tensor.dtype == torch.uint8:
            _reseed_quantized(state, name, optimizer, group, source, seeds)
        else:
            role = _role(name, tensor, optimizer)
            tensor.copy_(permute(tensor, source, _seed(role, name, tensor, source, group, state, seeds)))


def _role(name: str, tensor: Tensor, optimizer: torch.optim.Optimizer) -> str:
    """What a grown entry of a buffer starts with: "zero", "first" or "second" moment, or the "mean" of the kept."""
    if name == "state1" and type(optimizer).__name__.lower().removeprefix("paged").startswith(_SECOND_FIRST):
        return "second"
    for role, names in (("zero", ZERO_SEEDED), ("first", FIRST_MOMENTS), ("second", SECOND_MOMENTS)):
        if name in names:
            return role
    # Nobody knows the unit: what is never negative (a sum of squares, a step size) divides or scales, and must not be
    # zero; anything else adds up.
    return "mean" if bool((tensor >= 0).all()) and bool((tensor > 0).any()) else "zero"


def _seed(
    role: str,
    name: str,
    tensor: Tensor,
    source: Tensor,
    group: dict[str, Any],
    state: dict[str, Any],
    seeds: GrownSeeds | None,
) -> Tensor:
    m = int((source < 0).sum())
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    if role in ("zero", "first"):
        if role == "zero" or seeds is None:
            return torch.zeros(m, dtype=dtype, device=tensor.device)
        return torch.nan_to_num(seeds.mean) * _first_correction(name, group, state)
    values = torch.full((m,), _mean_of_kept(tensor, source), dtype=dtype, device=tensor.device)
    if role == "second" and seeds is not None:
        # exp_inf is a norm, in the gradient's unit and without correction.
        square = seeds.mean_square
        measured = square.sqrt() if name == "exp_inf" else square * _second_correction(group, state)
        values = torch.where(measured > 0, measured.to(dtype), values)
    return values.clamp(min=torch.finfo(tensor.dtype).tiny) if tensor.is_floating_point() else values


def _mean_of_kept(tensor: Tensor, source: Tensor) -> float:
    kept = tensor[source[source >= 0]]
    for entries in (kept, tensor):
        if entries.numel():
            mean = float(entries.to(torch.promote_types(entries.dtype, torch.float32)).mean())
            if mean > 0:
                return mean
    return 0.0


def _steps(state: dict[str, Any]) -> float | None:
    step = state.get("step")
    return None if step is None else float(step)


def _first_correction(name: str, group: dict[str, Any], state: dict[str, Any]) -> float:
    steps = _steps(state)
    if name == "momentum_buffer" and "momentum" in group and "betas" not in group:
        # SGD's buffer is a geometric sum, not a mean; a constant gradient g settles at g (1 - dampening) / (1 - mu).
        # Without dampening it is not SGD's: RMSprop and SM3 sum preconditioned steps, in another unit.
        mu = float(group["momentum"]) if "dampening" in group else 1.0
        return (1.0 - float(group.get("dampening", 0.0))) / (1.0 - mu) if mu < 1 else 0.0
    betas = group.get("betas")
    if betas is None or steps is None:
        return 1.0
    return 1.0 - float(betas[0]) ** steps


def _second_correction(group: dict[str, Any], state: dict[str, Any]) -> float:
    steps, betas = _steps(state), group.get("betas")
    if betas is None or steps is None or len(betas) < 2:
        return 1.0
    return 1.0 - float(betas[1]) ** steps


def _reseed_quantized(
    state: dict[str, Any],
    name: str,
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    source: Tensor,
    seeds: GrownSeeds | None,
) -> None:
    """bitsandbytes 8-bit state: dequantize the matrix's state, edit it, quantize it again."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    suffix = name.removeprefix("state")
    code, absmax = state[f"qmap{suffix}"], state[f"absmax{suffix}"]
    full = dequantize_blockwise(state[name], absmax=absmax, code=code, blocksize=_QUANT_BLOCK)
    role = _role(name, full, optimizer)
    edited = permute(full, source, _seed(role, name, full, source, group, state, seeds))
    packed, quant_state = quantize_blockwise(edited, code=code, blocksize=_QUANT_BLOCK)
    if role != "first":
        # A small second moment must not be rounded to zero: the next update would divide by it.
        smallest = int((code > 0).nonzero()[0])
        packed[(edited > 0) & (code[packed.int()] == 0)] = smallest
    state[name].copy_(packed)
    absmax.copy_(quant_state.absmax)
