"""The cycle itself: runs before and after every optimizer step that touches sparse deltas (Ansell et al., 2024, sec. 3).

It hangs on PyTorch's global optimizer step hooks, so no trainer has to know of it. Parameters are looked up at every
step: trainers and PEFT replace Parameter objects and group dicts between steps.
"""

from __future__ import annotations

import logging
import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from spiel_kernels import replace_positions, sm3_accumulate_

from ..delta import LIVE_DELTAS, AdapterRun, SparseDelta
from ..seeding import seeded_generator
from ..training_state import StepGradient, TrainingState
from .agreement import agree_on_proposals
from .collector import drop_step
from .exchange import decide_exchange
from .growth_registry import GrowthCriterion, GrowthRequest, get_growth_criterion
from .moments import GrownSeeds, check_state, permute, reseed_state
from .report import CycleReport
from .schedule import closes_at, is_skipped, lr_following_rate, regrow_rate
from .trainer_discovery import running_trainer_steps, trainer_starts_anew

logger = logging.getLogger(__name__)

# Which optimizer steps a delta; a new one begins a new run.
_OWNERS: weakref.WeakKeyDictionary[SparseDelta, weakref.ref[torch.optim.Optimizer]] = weakref.WeakKeyDictionary()
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


def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Begin a run where a delta sees its first step: decide whether it is a fresh one, learn its length."""
    if getattr(optimizer, "delegates_step", False):
        return
    held = [delta for delta, _ in held_deltas(optimizer)]
    for delta in held:
        if _begins_anew(delta, optimizer):
            begin_run(delta)
        _OWNERS[delta] = weakref.ref(optimizer)
    for delta in held:
        if delta.state.fresh is None:
            _decide_freshness(delta.run)
            _learn_total_steps(delta.run)


def _begins_anew(delta: SparseDelta, optimizer: torch.optim.Optimizer) -> bool:
    """Whether this step is the first of a new run, not the next one of the run that the delta's state is of."""
    if delta.state.step == 0:
        return False
    owner = _OWNERS.get(delta)
    if owner is None:
        # Loaded with its training state: to be resumed, unless that run was over.
        return delta.state.finished or trainer_starts_anew()
    if owner() is not optimizer:
        return True
    return delta.state.finished and trainer_starts_anew()


def begin_run(delta: SparseDelta) -> None:
    """Start counting steps anew; accumulators of the optimizer's second moments stay."""
    old = delta.state
    # Only a run that has stepped is over: gradients gathered for the first step of this one stay.
    if old.step:
        delta.state = TrainingState(row=old.row, col=old.col)
        delta.run.total_steps = delta.run.config.total_steps


def _decide_freshness(run: AdapterRun) -> None:
    deltas = run.deltas()
    fresh = not any(bool(delta.values.detach().any()) for delta in deltas)
    for delta in deltas:
        if delta.state.fresh is None:
            delta.state.fresh = fresh


def _learn_total_steps(run: AdapterRun) -> None:
    if run.total_steps is None:
        run.total_steps = running_trainer_steps()
    if run.total_steps is None and run.config.stop_regrowing_at < 1.0:
        raise ValueError(
            f"stop_regrowing_at={run.config.stop_regrowing_at} is a fraction of total_steps, and nothing says how long "
            "this run is: set total_steps in SpIELConfig, or pass it to SpIELOptimizer or SpIELCallback"
        )


def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Take the finished step into account, and close the cycle of every adapter that is due."""
    if getattr(optimizer, "delegates_step", False):
        return
    runs: dict[int, list[tuple[SparseDelta, dict[str, Any]]]] = {}
    for delta, group in held_deltas(optimizer):
        runs.setdefault(id(delta.run), []).append((delta, group))
    with torch.no_grad():
        for held in runs.values():
            _after_step_of_run(optimizer, held)


def _after_step_of_run(optimizer: torch.optim.Optimizer, held: list[tuple[SparseDelta, dict[str, Any]]]) -> None:
    grads = [delta.values.grad for delta, _ in held]
    if all(grad is None for grad in grads):
        return
    # A fused optimizer fires its hooks on overflow steps too, and unscales inside its kernel.
    scale = getattr(optimizer, "grad_scale", None)
    unscale = 1.0 if scale is None else 1.0 / float(scale)
    total = sum(grad.detach().double().sum().cpu() for grad in grads if grad is not None)
    if not math.isfinite(float(total)):
        for delta, _ in held:
            drop_step(delta)
            delta.state.unheld_steps = 0
        return
    for delta, group in held:
        _count_step(optimizer, delta, group, unscale)
    run = held[0][0].run
    config = run.config
    due = [
        (delta, group)
        for delta, group in held
        if closes_at(delta.state.step, config.regrow_every, config.accumulation_steps)
    ]
    criterion = get_growth_criterion(config.growth)
    if due and criterion.propose is not None:
        _close(optimizer, run, criterion, due)


def _count_step(optimizer: torch.optim.Optimizer, delta: SparseDelta, group: dict[str, Any], unscale: float) -> None:
    state = delta.state
    _commit_window(delta, unscale)
    state.current = StepGradient()
    state.step += 1
    state.total_steps = delta.run.total_steps or 0
    state.max_lr = max(state.max_lr, float(group.get("lr", 0.0)))
    state.unheld_steps = 0
    delta.untouched = False
    criterion = get_growth_criterion(delta.run.config.growth)
    if criterion.accumulates and delta.values.grad is not None and not optimizer_accumulates(optimizer):
        row, col = accumulators(delta)
        sm3_accumulate_(row, col, delta.indices, delta.values.grad.to(row.dtype) * unscale)
    if criterion.propose is not None:
        check_state(optimizer, delta.values)


def optimizer_accumulates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer updates the deltas' SM3 accumulators in its own step."""
    return bool(getattr(optimizer, "updates_spiel_accumulators", False))


def accumulators(delta: SparseDelta) -> tuple[Tensor, Tensor]:
    """The SM3 accumulators of a delta, ``[rows]`` and ``[cols]``, float32 (float64 for float64 values)."""
    state = delta.state
    if state.row is None or state.col is None:
        dtype = torch.promote_types(delta.values.dtype, torch.float32)
        device = delta.values.device
        state.row = torch.zeros(delta.rows, dtype=dtype, device=device)
        state.col = torch.zeros(delta.cols, dtype=dtype, device=device)
    return state.row, state.col


def _commit_window(delta: SparseDelta, unscale: float) -> None:
    """Add the finished step's candidate gradients to the window, scaled and clipped as the active ones were."""
    window, current = delta.state.window, delta.state.current
    if window is None:
        return
    if current.pending is not None:
        step_gradient = current.pending * _scaling(delta, unscale)
        window.sums += step_gradient
        window.squares += step_gradient.square()
    window.steps += 1


def _scaling(delta: SparseDelta, unscale: float) -> Tensor | float:
    """What unscaling, averaging and clipping made of the raw gradients: ``values.grad`` over the collected probes."""
    current, grad = delta.state.current, delta.values.grad
    if grad is None or current.probe is None or current.probe_sums is None:
        return unscale
    raw = current.probe_sums
    seen = grad[current.probe].to(raw.dtype) * unscale
    norm = (raw * raw).sum()
    return torch.where(norm > 0, (seen * raw).sum() / norm, torch.full_like(norm, unscale))


def _close(
    optimizer: torch.optim.Optimizer,
    run: AdapterRun,
    criterion: GrowthCriterion,
    due: list[tuple[SparseDelta, dict[str, Any]]],
) -> None:
    step = due[0][0].state.step
    if is_skipped(step, run.total_steps, run.config.stop_regrowing_at):
        for delta, _ in due:
            delta.state.window = None
        return
    replaced = total = 0
    magnitude = 0.0
    rate = 0.0
    for delta, group in due:
        rate = _rate(delta, group)
        magnitude += float(delta.values.abs().double().sum())
        replaced += _close_matrix(optimizer, criterion, delta, math.floor(rate * delta.k))
        total += delta.k
    report = CycleReport(step, rate, replaced, total - replaced, magnitude / total)
    run.log.append(report)
    logger.info("adapter %s: step %d, %d of %d deltas moved", run.adapter_name, step, replaced, total)


def _rate(delta: SparseDelta, group: dict[str, Any]) -> float:
    state, run, config = delta.state, delta.run, delta.run.config
    if state.fresh and state.closes == 0:
        # All deltas sit where chance put them: the first close replaces that choice as a whole.
        return 1.0
    if run.total_steps is not None:
        return regrow_rate(config.regrow_schedule, config.initial_regrow_rate, state.step, run.total_steps)
    return lr_following_rate(config.initial_regrow_rate, float(group.get("lr", 0.0)), state.max_lr)


def _close_matrix(optimizer: torch.optim.Optimizer, criterion: GrowthCriterion, delta: SparseDelta, count: int) -> int:
    state = delta.state
    request = _request(criterion, delta, count)
    proposed = criterion.propose(request) if count else request.indices[:0]
    proposed = agree_on_proposals(_checked(criterion, delta, proposed))
    exchange = decide_exchange(delta.indices, delta.values.detach(), proposed, count)
    moved = exchange.grown.numel()
    if moved:
        new, source = replace_positions(delta.indices, exchange.drop, exchange.grown)
        reseed_state(optimizer, delta.values, source, _seeds(delta, exchange.grown))
        delta.indices.copy_(new)
        delta.values.copy_(permute(delta.values.detach(), source, 0.0))
        if delta.values.grad is not None:
            delta.values.grad.copy_(permute(delta.values.grad, source, 0.0))
    state.closes += 1
    state.window = None
    return moved


def _request(criterion: GrowthCriterion, delta: SparseDelta, count: int) -> GrowthRequest:
    window = delta.state.window if criterion.gathers else None
    row, col = accumulators(delta) if criterion.accumulates else (None, None)
    return GrowthRequest(
        indices=delta.indices.to(torch.int64),
        shape=(delta.rows, delta.cols),
        numel=delta.numel,
        count=count,
        candidates=None if window is None else window.positions.to(torch.int64),
        candidate_sums=None if window is None else window.sums,
        row=row,
        col=col,
        generator=seeded_generator(delta.run.config.seed, delta.module_name, delta.state.closes + 1),
    )


def _checked(criterion: GrowthCriterion, delta: SparseDelta, proposed: Tensor) -> Tensor:
    """A criterion may be anybody's: what it proposes is checked before anything is changed."""
    proposed = proposed.to(device=delta.indices.device, dtype=torch.int64)
    bad = proposed.dim() != 1 or bool(((proposed < 0) | (proposed >= delta.numel)).any())
    if bad or torch.unique(proposed).numel() != proposed.numel():
        raise ValueError(
            f"growth criterion {criterion.name!r} must propose distinct positions in [0, {delta.numel}) as a "
            f"one-dimensional tensor; it did not for {delta.module_name!r}"
        )
    return proposed


def _seeds(delta: SparseDelta, grown: Tensor) -> GrownSeeds | None:
    window = delta.state.window
    if window is None or window.steps == 0 or window.positions.numel() == 0:
        return None
    positions = window.positions.to(torch.int64)
    slots = torch.searchsorted(positions, grown).clamp_(max=positions.numel() - 1)
    unknown = positions[slots] != grown
    mean = (window.sums / window.steps)[slots].masked_fill(unknown, math.nan)
    mean_square = (window.squares / window.steps)[slots].masked_fill(unknown, math.nan)
    return GrownSeeds(mean, mean_square)
