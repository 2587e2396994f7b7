"""Seeds: the values with which a grown delta's entries in the optimizer's buffers start.

One idea makes the rules: a grown entry gets the value that it would have by now if its gradient had been the mean of
the window since the optimizer's first step. For Adam that is the mean times ``1 - beta1**step``, so that the
corrected estimate is unbiased although `step` is kept per tensor. A sum builds up as a sum: SGD's momentum to ``g (1
- mu**t) / (1 - mu)``, Adagrad's to ``t g**2``. Second moments that the optimizer uses without correction are the
exception: they get the mean square in full. Both choices err to the same side: a grown delta never starts with longer
steps than one that had the same gradient all along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .exchange import Moves


@dataclass(frozen=True)
class GrownSeeds:
    """Window statistics of the positions that come into slots.

    Attributes:
        mean: mean gradient per step ``[entries]``; NaN for slots that stay and positions that were not in the window.
        mean_square: mean squared gradient per step ``[entries]``; NaN likewise.
        steps: optimizer steps of the run so far, for optimizers that do not count theirs.
    """

    mean: Tensor
    mean_square: Tensor
    steps: int

    def single(self, moves: Moves, number: int) -> GrownSeeds:
        """The statistics of one matrix: the one with this number in `moves`."""
        part = moves.entries.slice(number)
        return GrownSeeds(self.mean[part], self.mean_square[part], self.steps)


@dataclass(frozen=True)
class Past:
    """The past of a parameter under an optimizer: its group and the steps that were taken.

    Attributes:
        group: the parameter's group.
        steps: optimizer steps so far.
        corrects: whether the optimizer counts its steps, to correct averages that started at zero.
    """

    group: dict[str, Any]
    steps: int
    corrects: bool

    @classmethod
    def of(cls, group: dict[str, Any], state: dict[str, Any], run_steps: int, known: Mapping[int, int]) -> Past:
        """The past of a parameter.

        Args:
            group, state: the parameter's, of its optimizer.
            run_steps: steps of the run, for optimizers that do not count theirs.
            known: the contents of counters on a device, by the id of the tensor (see `counter`).
        """
        count = counter(group, state)
        counted = None if count is None else known[id(count)] if id(count) in known else int(count)
        corrects = counted is not None and bool(group.get("bias_correction", True))
        return cls(group, run_steps if counted is None else counted, corrects)

    def beta(self, number: int) -> float:
        betas = self.group["betas"]
        return float(betas[min(number, len(betas) - 1)])

    @property
    def sign(self) -> float:
        """-1 for optimizers that maximize, as they negate gradients first; else 1."""
        return -1.0 if self.group.get("maximize") else 1.0


def counter(group: dict[str, Any], state: dict[str, Any]) -> int | float | Tensor | None:
    """What counts the steps of a parameter under its optimizer, if anything does."""
    # Apex counts in the group; so does Schedule-Free, as "k", which means other things elsewhere.
    counts = (state.get("step"), group.get("step"), group.get("k") if "weight_sum" in group else None)
    return next((count for count in counts if isinstance(count, (int, float, Tensor))), None)


Measure = Callable[[GrownSeeds, Past], Tensor]


@dataclass(frozen=True)
class Rule:
    """How the grown entries of one buffer are seeded.

    Attributes:
        measured: computes the seeds ``[entries]`` from the window; None if the window says nothing about this buffer.
        otherwise: the seed where nothing was measured: "zero"; "kept": the mean over the matrix's kept entries; "kept
            or zero": the same if no entry of the matrix is negative, else zero; "lr": the learning rate. Buffers with
            "kept" or "lr" scale or divide updates, so their seeds are never zero.
    """

    measured: Measure | None
    otherwise: str

    @property
    def positive(self) -> bool:
        return self.otherwise in ("kept", "lr")


def _average(number: int) -> Rule:
    """Moving average of gradients that decays by ``betas[number]``."""
    return Rule(lambda seeds, past: seeds.mean * past.sign * (1.0 - past.beta(number) ** past.steps), "zero")


def _slow_average(seeds: GrownSeeds, past: Past) -> Tensor:
    """AdEMAMix's slow average: never corrected, and its decay may be scheduled over ``t_beta3`` steps."""
    t_beta3 = past.group.get("t_beta3")
    log_decay = past.steps * math.log(past.beta(2))
    if t_beta3:
        log_fast, log_slow = math.log(past.beta(0)), math.log(past.beta(2))
        progress = torch.arange(1, past.steps + 1, dtype=torch.float64) / float(t_beta3)
        log_decays = log_fast * log_slow / ((1.0 - progress) * log_slow + progress * log_fast)
        log_decay = float(log_decays.clamp(max=log_slow).sum())
    return seeds.mean * past.sign * -math.expm1(log_decay)


def _momentum(seeds: GrownSeeds, past: Past) -> Tensor:
    """SGD's momentum, a geometric sum; only its first gradient is not dampened."""
    mu, steps = float(past.group["momentum"]), past.steps
    return seeds.mean * past.sign * _geometric_sum(mu, steps, float(past.group["dampening"]))


def _momentum_in_betas(seeds: GrownSeeds, past: Past) -> Tensor:
    """Momentum of bitsandbytes' optimizers, which have no dampening."""
    return seeds.mean * _geometric_sum(past.beta(0), past.steps, 0.0)


def _geometric_sum(mu: float, steps: int, dampening: float) -> float:
    if steps < 1:
        return 0.0
    later = float(steps - 1) if mu >= 1.0 else (1.0 - mu ** (steps - 1)) / (1.0 - mu)
    return mu ** (steps - 1) + (1.0 - dampening) * later


def _corrected_square(seeds: GrownSeeds, past: Past) -> Tensor:
    corrects = past.corrects and len(past.group.get("betas") or ()) > 1
    return seeds.mean_square * ((1.0 - past.beta(1) ** past.steps) if corrects else 1.0)


def _sum_of_squares(seeds: GrownSeeds, past: Past) -> Tensor:
    return float(past.group.get("initial_accumulator_value", 0.0)) + seeds.mean_square * past.steps


_ZERO = Rule(None, "zero")
_KEPT = Rule(None, "kept")
_LEARNING_RATE = Rule(None, "lr")
_SQUARE = Rule(lambda seeds, past: seeds.mean_square, "kept")
_CORRECTED_SQUARE = Rule(_corrected_square, "kept")
# Absolute values, in the unit of the gradient.
_NORM = Rule(lambda seeds, past: seeds.mean_square.sqrt(), "kept")
_SUM_OF_SQUARES = Rule(_sum_of_squares, "kept")
# For the buffers of unknown optimizers. One that is never negative (a sum of squares, a step size) divides or scales
# updates and must not be zero. Any other adds up gradients, so zero is neutral.
_UNKNOWN = Rule(None, "kept or zero")

# By the names that torch, transformers and most others use.
_BY_NAME = {
    "exp_avg": _average(0),
    "exp_avg_fast": _average(0),
    "exp_avg_slow": Rule(_slow_average, "zero"),
    "momentum_buffer": Rule(_momentum, "zero"),
    "exp_avg_sq": _CORRECTED_SQUARE,
    "max_exp_avg_sq": _CORRECTED_SQUARE,
    "square_avg": _SQUARE,
    "variance": _SQUARE,
    "exp_inf": _NORM,
    "sum": _SUM_OF_SQUARES,
    "step_size": _LEARNING_RATE,
    # Zero is right for a new entry: Rprop's last gradient, RMSprop's mean (its variance is the mean square then),
    # averages and iterates of the deltas themselves.
    "prev": _ZERO,
    "grad_avg": _ZERO,
    "ax": _ZERO,
    "z": _ZERO,
}
# Settings that an optimizer must have for the rule of that name. Without them the buffer has another unit: it is
# preconditioned, or scaled by a learning rate.
_NEEDS = {
    "exp_avg": ("betas",),
    "exp_avg_fast": ("betas",),
    "exp_avg_slow": ("betas",),
    "momentum_buffer": ("momentum", "dampening"),
    "sum": ("initial_accumulator_value",),
    "step_size": ("step_sizes",),
}
# By bitsandbytes' name of the update: the rules of `state1`, one per row, and of `state2`.
_BITSANDBYTES: dict[str, tuple[tuple[Rule, ...], tuple[Rule, ...]]] = {
    "adam": ((_average(0),), (_CORRECTED_SQUARE,)),
    "lamb": ((_average(0),), (_CORRECTED_SQUARE,)),
    "ademamix": ((_average(0), Rule(_slow_average, "zero")), (_CORRECTED_SQUARE,)),
    # Lion steps by the sign of a mix with betas[0]; its average decays by betas[1].
    "lion": ((_average(1),), ()),
    "momentum": ((Rule(_momentum_in_betas, "zero"),), ()),
    "lars": ((Rule(_momentum_in_betas, "zero"),), ()),
    "rmsprop": ((_SQUARE,), ()),
    "adagrad": ((_SUM_OF_SQUARES,), ()),
}


def rules_of(optimizer: torch.optim.Optimizer, group: dict[str, Any], name: str, rows: int) -> list[Rule]:
    """The rule for each row of a buffer.

    Args:
        optimizer: whose buffer it is.
        group: the parameter's group.
        name: of the buffer in the optimizer's state.
        rows: how many it has.
    """
    known = _BITSANDBYTES.get(getattr(optimizer, "optimizer_name", ""))
    if known is not None and name in ("state1", "state2"):
        rules = known[0] if name == "state1" else known[1]
        if len(rules) == rows:
            return list(rules)
    return [_rule_by_name(optimizer, group, name) or _UNKNOWN] * rows


def _rule_by_name(optimizer: torch.optim.Optimizer, group: dict[str, Any], name: str) -> Rule | None:
    rule = _BY_NAME.get(name)
    if rule is None or {"d", "growth_rate"} <= group.keys():
        # Prodigy and D-Adaptation keep their moments in units of the step size d that they estimate.
        return None
    if any(group.get(setting) is None for setting in _NEEDS.get(name, ())):
        return _KEPT if rule.positive else _ZERO
    if name == "exp_avg" and "lion" in type(optimizer).__name__.lower():
        return _average(1)
    return rule


def seeds_for(rule: Rule, row: Tensor, moves: Moves, past: Past, seeds: GrownSeeds | None) -> Tensor:
    """The seeds ``[entries]`` of one row of a buffer; they matter for slots into which a position comes.

    Args:
        rule: see `rules_of`.
        row: the entries before the close, ``[entries]``.
        moves: what the close does to them.
        past: of the optimizer and the parameters.
        seeds: window statistics of the grown positions; None without a window.
    """
    dtype = torch.promote_types(row.dtype, torch.float32)
    out = _otherwise(rule, row, moves, past).to(dtype).expand(row.shape)
    if rule.measured is not None and seeds is not None:
        measured = rule.measured(seeds, past).to(out)
        # Positions that were not in the window, or had no gradient in it, have no measure.
        out = torch.where(measured > 0 if rule.positive else measured.isfinite(), measured, out)
    if rule.positive and row.is_floating_point():
        out = out.clamp(min=torch.finfo(row.dtype).tiny)
    return out


def stays_positive(rule: Rule, row: Tensor) -> Tensor | bool:
    """Whether entries above zero of one matrix's row ``[k]`` must stay above zero when they are rounded."""
    return _is_scale(row) if rule is _UNKNOWN else rule.positive


def _is_scale(row: Tensor) -> Tensor:
    """Whether no entry is negative and one is positive, as a bool on the device."""
    return (row >= 0).all() & (row > 0).any()


def _otherwise(rule: Rule, row: Tensor, moves: Moves, past: Past) -> Tensor:
    """The seed where nothing was measured: one number, or one for each entry."""
    if rule.otherwise == "lr":
        smallest, largest = past.group["step_sizes"]
        lr = min(max(float(past.group["lr"]), float(smallest)), float(largest))
        return torch.full((), lr, dtype=torch.float64, device=row.device)
    if rule.otherwise == "zero":
        return torch.zeros((), dtype=torch.float64, device=row.device)
    kept = _mean_of_kept(row, moves)
    if rule is _UNKNOWN:
        kept = kept.where(torch.stack([_is_scale(part) for part in moves.entries.split(row)]), 0.0)
        if row.is_floating_point():
            kept = torch.where(kept > 0, kept.clamp(min=torch.finfo(row.dtype).tiny), kept)
    return moves.entries.of_owner(kept)


def _mean_of_kept(row: Tensor, moves: Moves) -> Tensor:
    """float64 ``[matrices]``: the mean of the entries that stay or, where that is not positive, of all; at least zero.

    If all entries are new, or the kept ones never had a gradient, the pruned entries give the scale.
    """
    entries, wide = moves.entries, row.to(torch.float64)
    both = torch.stack([wide.masked_fill(moves.grown, 0.0), wide])
    kept, every = torch.stack([part.sum(1) for part in both.split(entries.sizes, 1)], 1)
    sizes = entries.bounds.diff()
    kept, every = kept / (sizes - entries.count(moves.grown)), every / sizes
    return kept.where(kept > 0, every.clamp(min=0.0))
