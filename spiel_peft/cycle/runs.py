"""Decides at a step whether a training run begins, goes on or is resumed, and finds out how long it will be."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch

from ..call_stack import running_trainer, trainer_state
from ..checks import first_of
from ..delta import AdapterRun, SparseDelta
from ..growth import get_growth_criterion
from ..state import StepGradient, TrainingState
from .close import in_window
from .resume import carry, take_up
from .steps import any_nonzero

# Optimizers that have stepped deltas. Their state belongs to the indices that the deltas had then.
_STEPPED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def owned_by_another(delta: SparseDelta, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a different optimizer has stepped the delta in its present run, and did not hand its state over."""
    owner = delta.state.owner
    return owner is not None and owner() is not optimizer and not delta.state.with_optimizer


def begin_run(delta: SparseDelta) -> None:
    """Give a delta the state of a new run. Its SM3 accumulators stay."""
    old = delta.state
    # A state without steps is that of the new run already, with the gradients of its first backward passes.
    if not old.step:
        return
    delta.state = TrainingState(row=old.row, col=old.col, sought=True)
    if old.finished and old.window is not None and old.window.steps == 0:
        delta.state.window, delta.state.current = old.window, old.current


def join(optimizer: torch.optim.Optimizer, deltas: list[SparseDelta]) -> None:
    """Begin or resume the runs of the deltas that `optimizer` is about to step, where that is due.

    Called before every step.

    Raises:
        ValueError: the length of the run is needed and unknown, or the optimizer was loaded with the state of another
            run; nothing was trained then.
    """
    take_up(optimizer, at_step=True)
    restarted = {run for run in {delta.run for delta in deltas} if _trains_again(run)}
    # A finished run that steps on may be the next `train()` of the same trainer.
    joining = [
        d
        for d in deltas
        if d.state.owner is None or d.state.owner() is not optimizer or d.state.finished or d.run in restarted
    ]
    if not joining:
        return
    trainer = running_trainer()
    for resumed in {d.run: d for d in joining if d.state.owner is None and d.state.step}.values():
        _refuse_half_loaded([d for d in joining if d.run is resumed.run and d.untouched])
        _warn_of_another_cycle(resumed)
    for delta in joining:
        if owned_by_another(delta, optimizer):
            set_total_steps(delta.run, delta.run.config.total_steps)
        if _begins_anew(delta, optimizer, trainer_state(trainer), delta.run in restarted):
            begin_run(delta)
        else:
            _drop_misplaced_window(delta)
        _drop_moments_of_other_indices(delta, optimizer)
    for run in {delta.run: None for delta in joining if delta.state.owner is None or delta.run in restarted}:
        _learn_total_steps(run, trainer)
        _decide_freshness(run)
        _warn_if_nothing_will_close(run)
    for delta in joining:
        delta.state.owner = weakref.ref(optimizer)
        delta.state.with_optimizer = False
    _STEPPED.add(optimizer)
    carry(optimizer)


def _trains_again(run: AdapterRun) -> bool:
    """Whether the Hugging Face trainer of the run trains once more: its `train()` has made a new TrainerState."""
    record = run.record
    trainer = record.trainer() if record.trainer is not None else None
    return trainer is not None and trainer.state is not record.trainer_state()


def _begins_anew(delta: SparseDelta, optimizer: torch.optim.Optimizer, trainer: Any, restarted: bool) -> bool:
    """Whether this step is the first one of a new run, not the next one of the run in the delta's state."""
    trainer_starts = trainer is not None and trainer.global_step == 0
    if delta.state.owner is None:
        # The state was loaded, so the run is resumed, unless it was over and no greater length was set.
        return trainer_starts or (delta.state.finished and trainer is None and not delta.state.with_optimizer)
    return owned_by_another(delta, optimizer) or (trainer_starts and (restarted or delta.state.finished))


def _refuse_half_loaded(untouched: list[SparseDelta]) -> None:
    if untouched:
        shown = first_of(sorted(delta.module_name for delta in untouched))
        raise ValueError(
            f"Adapter {untouched[0].run.adapter_name!r} cannot be resumed: the checkpoint has no deltas for {shown}. "
            "Resume on the model and with the target_modules that the checkpoint was made with."
        )


def _warn_of_another_cycle(delta: SparseDelta) -> None:
    saved, config = delta.state.saved_cycle, delta.run.config
    if saved is not None and saved != (config.regrow_every, config.accumulation_steps):
        warnings.warn(
            f"Adapter {delta.run.adapter_name!r} is resumed with regrow_every={config.regrow_every}, "
            f"accumulation_steps={config.accumulation_steps}; its checkpoint was made with {saved[0]} and {saved[1]}. "
            "The new schedule holds from here on, so the run does not end as it would have without the interruption.",
            stacklevel=2,
        )


def _drop_misplaced_window(delta: SparseDelta) -> None:
    """Drop an open window if the schedule has none at this step.

    Such a window comes from another schedule, or from a backward pass after the end of a run, which takes the next step
    for the first one of a new run.
    """
    state, config = delta.state, delta.run.config
    if state.window is not None and not in_window(state.step, config.regrow_every, config.accumulation_steps):
        state.window, state.current = None, StepGradient()


def _drop_moments_of_other_indices(delta: SparseDelta, optimizer: torch.optim.Optimizer) -> None:
    """Drop the optimizer's state for a delta whose indices were loaded without the state that belongs to them."""
    if delta.reindexed and optimizer in _STEPPED and not delta.state.with_optimizer:
        optimizer.state.pop(delta.values, None)
    delta.reindexed = False


def _decide_freshness(run: AdapterRun) -> None:
    deltas = run.deltas()
    undecided = [delta for delta in deltas if delta.state.fresh is None]
    if undecided:
        fresh = not any_nonzero([delta.values for delta in deltas])
        for delta in undecided:
            delta.state.fresh = fresh


def _learn_total_steps(run: AdapterRun, trainer: Any) -> None:
    state = trainer_state(trainer)
    if state is not None:
        record = run.record
        record.trainer, record.trainer_state = weakref.ref(trainer), weakref.ref(state)
        if run.total_steps is None or record.length_from_trainer:
            run.total_steps = int(state.max_steps)
            record.length_from_trainer = True
    if run.total_steps is None:
        # A resumed run keeps its length.
        run.total_steps = max(delta.state.total_steps for delta in run.deltas()) or None
    if run.total_steps is None and run.config.stop_regrowing_at < 1.0:
        raise ValueError(
            f"stop_regrowing_at={run.config.stop_regrowing_at} is a fraction of total_steps, and nothing says how long "
            "this run is: set total_steps in SpIELConfig, or pass it to SpIELOptimizer or SpIELCallback"
        )


def _warn_if_nothing_will_close(run: AdapterRun) -> None:
    first = run.config.accumulation_steps
    if run.total_steps is None or run.total_steps >= first or get_growth_criterion(run.config.growth).propose is None:
        return
    warnings.warn(
        f"Adapter {run.adapter_name!r}: the run of {run.total_steps} optimizer steps ends before its first cycle "
        f"closes, at step accumulation_steps={first}: its positions stay as they are (a new adapter's: drawn at "
        "random). Lower accumulation_steps or train longer.",
        stacklevel=2,
    )


def check_total_steps(total_steps: int | None) -> None:
    """Raise a ValueError unless `total_steps` is a positive int, or None."""
    if total_steps is not None and (
        isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1
    ):
        raise ValueError(f"total_steps must be a positive int (optimizer steps of the run), got {total_steps!r}")


def set_total_steps(run: AdapterRun, total_steps: int | None) -> None:
    """Set the length of a run in optimizer steps; None if it is not known yet."""
    run.total_steps = total_steps
    run.record.length_from_trainer = False
