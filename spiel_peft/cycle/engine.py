"""The cycle itself: runs before and after every optimizer step that touches sparse deltas (Ansell et al., 2024).

It hangs on PyTorch's global optimizer step hooks, so no trainer has to know of it. Parameters are looked up at every
step: trainers and PEFT replace Parameter objects and group dicts between steps.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from spiel_kernels import replace_positions

from ..call_stack import is_rehearsal
from ..delta import LIVE_DELTAS, AdapterRun, SparseDelta
from ..growth import GrowthCriterion, get_growth_criterion
from ..state import StepGradient
from . import parallel, steps
from .agreement import SKIPPED, WITHOUT_GRADIENT, agree_on_step, check_same, decide
from .close import CycleReport, Exchange, closes_at, is_skipped, lr_following_rate, regrow_rate
from .grown_seeds import GrownSeeds
from .optimizer_buffers import check_optimizer, check_state, permute, reseed_states
from .parallel import note_step, ranks_of, refuse_mixed_groups
from .ranks import Ranks
from .resume import carry
from .runs import begin_run, check_total_steps, join, owned_by_another, set_total_steps
from .steps import accumulate_after_step, note_gradients, when_known, will_take_place
from .window import commit_windows, drop_step, narrow, ready_probes

logger = logging.getLogger(__name__)

_handles: list[Any] = []


def install() -> None:
    """Register the global step hooks; once per process however often it is called."""
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(before_step))
        _handles.append(register_optimizer_step_post_hook(after_step))
        parallel.install()


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
    """Begin a run where a delta sees its first step."""
    deltas = [delta for delta, _ in held_deltas(optimizer)]
    if not deltas or getattr(optimizer, "delegates_step", False):
        return None
    if is_rehearsal():
        carry(optimizer)
        return None
    if not steps.begin(optimizer, {id(delta.values) for delta in deltas}):
        return None
    refuse_mixed_groups(optimizer, deltas)
    check_optimizer(optimizer, deltas)
    join(optimizer, deltas)

    def note(first: bool) -> None:
        ready_probes(deltas)
        note_gradients(optimizer, deltas, first)

    return when_known(note, args, kwargs)


def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Take the finished step into account, and close the cycle of every adapter that is due."""
    if getattr(optimizer, "delegates_step", False) or is_rehearsal():
        return
    parties: dict[tuple[int, Ranks | None], list[tuple[SparseDelta, dict[str, Any]]]] = {}
    optimizers = steps.end(optimizer)
    if not optimizers:
        return
    held = held_deltas(optimizer)
    for delta, group in held:
        parties.setdefault((id(delta.run), ranks_of(delta)), []).append((delta, group))
    with torch.no_grad():
        for (_, ranks), held_together in parties.items():
            _after_step_of_run(optimizers, held_together, ranks)
    note_step([delta for delta, _ in held])


def _after_step_of_run(
    optimizers: list[torch.optim.Optimizer], held: list[tuple[SparseDelta, dict[str, Any]]], ranks: Ranks | None
) -> None:
    deltas = [delta for delta, _ in held]
    outcome = _outcome(optimizers, deltas, ranks)
    if outcome == WITHOUT_GRADIENT:
        return
    if outcome == SKIPPED:
        for delta in deltas:
            drop_step(delta)
            delta.state.unheld_steps = 0
        return
    commit_windows(deltas, ranks)
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
        _close(optimizers, run, criterion, due, ranks)


def _outcome(optimizers: list[torch.optim.Optimizer], deltas: list[SparseDelta], ranks: Ranks | None) -> int:
    """Whether the step counts; one wait for the device, however many matrices and ranks there are."""
    grads = [delta.values.grad for delta in deltas if delta.values.grad is not None]
    if ranks is None:
        return int(will_take_place(optimizers, grads)) if grads else WITHOUT_GRADIENT
    own = will_take_place(optimizers, grads) if grads else torch.tensor(WITHOUT_GRADIENT)
    return agree_on_step(ranks, deltas, own)


def _count_step(optimizers: list[torch.optim.Optimizer], delta: SparseDelta, group: dict[str, Any]) -> None:
    accumulate_after_step(optimizers, delta)
    state = delta.state
    state.current = StepGradient()
    state.step += 1
    state.total_steps = delta.run.total_steps or 0
    state.max_lr = max(state.max_lr, _learning_rate(group))
    state.unheld_steps = 0
    if delta.untouched:  # assigning to a module is slow, and this is every step
        delta.untouched = False


def _learning_rate(group: dict[str, Any]) -> float:
    # Some optimizers set their own and leave this None.
    return float(group.get("lr") or 0.0)


def _close(
    optimizers: list[torch.optim.Optimizer],
    run: AdapterRun,
    criterion: GrowthCriterion,
    due: list[tuple[SparseDelta, dict[str, Any]]],
    ranks: Ranks | None,
) -> None:
    deltas = [delta for delta, _ in due]
    step = deltas[0].state.step
    if is_skipped(step, run.total_steps, run.config.stop_regrowing_at):
        if ranks is not None:
            check_same(ranks, deltas)
        for delta in deltas:
            delta.state.window = None
        return
    # Everything is decided, and what a criterion proposes and the optimizer keeps is checked, before anything is
    # changed.
    for delta, _ in due:
        check_state(optimizers, delta.values)
    for delta in deltas:
        narrow(delta)
    rates = [_rate(delta, group) for delta, group in due]
    counts = [math.floor(rate * delta.k) for delta, rate in zip(deltas, rates, strict=True)]
    exchanges = decide(ranks, criterion, deltas, counts)
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


def _carry_out(
    optimizers: list[torch.optim.Optimizer], criterion: GrowthCriterion, delta: SparseDelta, exchange: Exchange
) -> None:
    state = delta.state
    if exchange.grown.numel():
        new, source = replace_positions(delta.indices, exchange.drop, exchange.grown)
        seeds = _seeds(criterion, delta, exchange.grown)
        reseed_states(optimizers, delta.values, source, seeds)
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
    return GrownSeeds(mean, mean_square, delta.state.step)


# Ties an optimizer to the deltas of a model, for those who want to be sure, and to say how long the run is.


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
