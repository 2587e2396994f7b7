"""The cycle itself: runs before and after every optimizer step that touches sparse deltas (Ansell et al., 2024).

It hangs on PyTorch's global optimizer step hooks, so no trainer has to know of it. Parameters are looked up at every
step: trainers and PEFT replace Parameter objects and group dicts between steps.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from spiel_kernels import replace_positions

from ..delta import LIVE_DELTAS, AdapterRun, SparseDelta
from ..resident import unfold_deltas
from ..training_state import StepGradient
from . import nested_steps
from .agreement import agree_on_proposals, agree_on_values
from .collector import drop_step
from .exchange import Exchange, decide_exchange
from .growth_registry import GrowthCriterion, get_growth_criterion
from .moments import permute, reseed_state
from .optimizer_check import check_optimizer, check_state
from .proposals import propose
from .report import CycleReport
from .runs import join
from .schedule import closes_at, is_skipped, lr_following_rate, regrow_rate
from .state_rules import GrownSeeds
from .step_gradients import accumulate_after_step, gradient_at_probes, note_gradients, when_known, will_take_place

logger = logging.getLogger(__name__)

_handles: list[Any] = []


def install() -> None:
    """Register the global step hooks; once per process however often it is called."""
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(before_step))
        _handles.append(register_optimizer_step_post_hook(after_step))


def held_deltas(optimizer: torch.optim.Optimizer) -> list[tuple[SparseDelta, dict[str, Any]]]:
    """The live trainable deltas whose values `optimizer` steps, each with its parameter group, ordered by name."""
    live = {id(delta.values): delta for delta in LIVE_DELTAS if delta.values.requires_grad}
    if not live:
        return []
    held = [
        (live[id(parameter)], group)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) in live
    ]
    return sorted(held, key=lambda pair: (pair[0].run.adapter_name, pair[0].module_name))


def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """Take the deltas out of the base weights, and begin a run where a delta sees its first step."""
    deltas = [delta for delta, _ in held_deltas(optimizer)]
    unfold_deltas(deltas)
    if not deltas or getattr(optimizer, "delegates_step", False):
        return None
    if not nested_steps.begin(optimizer, {id(delta.values) for delta in deltas}):
        return None
    check_optimizer(optimizer, deltas)
    join(optimizer, deltas)

    def note(first: bool) -> None:
        note_gradients(optimizer, deltas, first)

    return when_known(note, args, kwargs)


def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Take the finished step into account, and close the cycle of every adapter that is due."""
    if getattr(optimizer, "delegates_step", False):
        return
    runs: dict[int, list[tuple[SparseDelta, dict[str, Any]]]] = {}
    held = held_deltas(optimizer)
    # A closure runs forward passes inside the step.
    unfold_deltas(delta for delta, _ in held)
    optimizers = nested_steps.end(optimizer)
    if not optimizers:
        return
    for delta, group in held:
        runs.setdefault(id(delta.run), []).append((delta, group))
    with torch.no_grad():
        for held_by_run in runs.values():
            _after_step_of_run(optimizers, held_by_run)


def _after_step_of_run(optimizers: list[torch.optim.Optimizer], held: list[tuple[SparseDelta, dict[str, Any]]]) -> None:
    grads = [delta.values.grad for delta, _ in held if delta.values.grad is not None]
    if not grads:
        return
    # One wait for the device, however many matrices there are.
    if not bool(will_take_place(optimizers, grads)):
        for delta, _ in held:
            drop_step(delta)
            delta.state.unheld_steps = 0
        return
    factors = _scalings([delta for delta, _ in held])
    _commit_windows([delta for delta, _ in held], factors)
    for delta, group in held:
        _count_step(optimizers, delta, group)
    run = held[0][0].run
    config = run.config
    due = [
        (delta, group)
        for delta, group in held
        if closes_at(delta.state.step, config.regrow_every, config.accumulation_steps)
    ]
    criterion = get_growth_criterion(config.growth)
    if due and criterion.propose is not None:
        _close(optimizers, run, criterion, due)


def _count_step(optimizers: list[torch.optim.Optimizer], delta: SparseDelta, group: dict[str, Any]) -> None:
    accumulate_after_step(optimizers, delta)
    state = delta.state
    state.current = StepGradient()
    state.step += 1
    state.total_steps = delta.run.total_steps or 0
    state.max_lr = max(state.max_lr, _learning_rate(group))
    state.unheld_steps = 0
    delta.untouched = False
    delta.is_stepped = not state.finished


def _learning_rate(group: dict[str, Any]) -> float:
    # Some optimizers set their own and leave this None.
    return float(group.get("lr") or 0.0)


def _commit_windows(deltas: list[SparseDelta], factors: dict[SparseDelta, Tensor]) -> None:
    """Add the finished step's candidate gradients to the open windows, scaled and clipped as the active ones were."""
    windowed = [delta for delta in deltas if delta.state.window is not None]
    gathered = [d for d in windowed if d.state.current.pending is not None and d in factors]
    finite: dict[SparseDelta, bool] = {}
    if gathered:
        # Candidates can overflow where no active delta does; the trainer then sees no reason to skip the step. One
        # wait for the device tells for all of them.
        device = gathered[0].values.device
        sums = torch.stack([_step_gradient(d, factors[d]).sum(dtype=torch.float64).to(device) for d in gathered])
        finite = dict(zip(gathered, torch.isfinite(sums).tolist(), strict=True))
    for delta in windowed:
        if finite.get(delta) is False:
            drop_step(delta)
            continue
        window = delta.state.window
        if delta in finite:
            step_gradient = _step_gradient(delta, factors[delta])
            window.sums += step_gradient
            window.squares += step_gradient.square_()
        window.steps += 1


def _step_gradient(delta: SparseDelta, factor: Tensor) -> Tensor:
    pending = delta.state.current.pending
    return pending * factor.to(pending.dtype)


def _scalings(deltas: list[SparseDelta]) -> dict[SparseDelta, Tensor]:
    """What unscaling, averaging and clipping made of each gathering delta's raw gradients: ``grad`` over the probes.

    Optimizers that unscale inside their kernel write the result back, so this holds for them too. A matrix whose
    probes are all zero (an embedding whose active rows did not occur) takes the factor of the others.
    """
    products: dict[SparseDelta, tuple[Tensor, Tensor]] = {}
    for delta in deltas:
        seen = gradient_at_probes(delta)
        if seen is not None:
            raw = delta.state.current.probe_sums.double()
            products[delta] = (seen.double() * raw).sum(), (raw * raw).sum()
    if not products:
        return {}
    device = deltas[0].values.device
    seen_total = torch.stack([seen.to(device) for seen, _ in products.values()]).sum()
    raw_total = torch.stack([raw.to(device) for _, raw in products.values()]).sum()
    overall = torch.where(raw_total > 0, seen_total / raw_total, torch.ones_like(raw_total))
    return {delta: torch.where(raw > 0, seen / raw, overall.to(raw.device)) for delta, (seen, raw) in products.items()}


def _close(
    optimizers: list[torch.optim.Optimizer],
    run: AdapterRun,
    criterion: GrowthCriterion,
    due: list[tuple[SparseDelta, dict[str, Any]]],
) -> None:
    step = due[0][0].state.step
    if is_skipped(step, run.total_steps, run.config.stop_regrowing_at):
        for delta, _ in due:
            delta.state.window = None
        return
    # Everything is decided, and what a criterion proposes and the optimizer keeps is checked, before anything is
    # changed.
    for delta, _ in due:
        check_state(optimizers, delta.values)
    rates = [_rate(delta, group) for delta, group in due]
    exchanges = [
        _decide(criterion, delta, math.floor(rate * delta.k)) for (delta, _), rate in zip(due, rates, strict=True)
    ]
    magnitude = sum(float(delta.values.abs().double().sum()) for delta, _ in due)
    for (delta, _), exchange in zip(due, exchanges, strict=True):
        _carry_out(optimizers, criterion, delta, exchange)
    replaced, total = sum(e.grown.numel() for e in exchanges), sum(delta.k for delta, _ in due)
    report = CycleReport(step, rates[0], replaced, total - replaced, magnitude / total)
    run.log.append(report)
    logger.info("adapter %s: step %d, %d of %d deltas moved", run.adapter_name, step, replaced, total)


def _rate(delta: SparseDelta, group: dict[str, Any]) -> float:
    state, run, config = delta.state, delta.run, delta.run.config
    if state.fresh and state.closes == 0:
        # All deltas sit where chance put them: the first close replaces that choice as a whole.
        return 1.0
    if run.total_steps is not None:
        return regrow_rate(config.regrow_schedule, config.initial_regrow_rate, state.step, run.total_steps)
    return lr_following_rate(config.initial_regrow_rate, _learning_rate(group), state.max_lr)


def _decide(criterion: GrowthCriterion, delta: SparseDelta, count: int) -> Exchange:
    proposed = agree_on_proposals(propose(criterion, delta, count))
    exchange = decide_exchange(delta.indices, delta.values.detach(), proposed, count)
    # Held for all matrices at once, so no wider than need be.
    return Exchange(exchange.drop, exchange.grown.to(delta.indices.dtype))


def _carry_out(
    optimizers: list[torch.optim.Optimizer], criterion: GrowthCriterion, delta: SparseDelta, exchange: Exchange
) -> None:
    state = delta.state
    if exchange.grown.numel():
        new, source = replace_positions(delta.indices, exchange.drop, exchange.grown)
        seeds = _seeds(criterion, delta, exchange.grown)
        for optimizer in optimizers:
            reseed_state(optimizer, delta.values, source, seeds)
        delta.indices.copy_(new)
        delta.values.copy_(permute(delta.values.detach(), source, 0.0))
        if delta.values.grad is not None:
            delta.values.grad.copy_(permute(delta.values.grad, source, 0.0))
    state.closes += 1
    state.window = None


def _seeds(criterion: GrowthCriterion, delta: SparseDelta, grown: Tensor) -> GrownSeeds | None:
    if not criterion.gathers:
        return None
    window = delta.state.window
    grown = grown.to(torch.int64)
    dtype = torch.promote_types(delta.values.dtype, torch.float32)
    mean = torch.full(grown.shape, math.nan, dtype=dtype, device=grown.device)
    mean_square = mean.clone()
    if window is not None and window.steps and window.positions.numel():
        positions = window.positions.to(torch.int64)
        slots = torch.searchsorted(positions, grown).clamp_(max=positions.numel() - 1)
        known = positions[slots] == grown
        mean[known] = (window.sums[slots[known]] / window.steps).to(mean)
        mean_square[known] = (window.squares[slots[known]] / window.steps).to(mean)
    return GrownSeeds(agree_on_values(mean), agree_on_values(mean_square), delta.state.step)
