"""When a training run of an adapter begins: whose optimizer it is, whether it is fresh, how long it will be."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ..delta import AdapterRun, SparseDelta
from ..training_state import TrainingState
from .trainer_discovery import running_trainer_state

# Which optimizer steps a delta. Keyed by its state: one that was just loaded belongs to nobody, so that whoever steps
# it first continues it instead of beginning anew.
_OWNERS: weakref.WeakKeyDictionary[TrainingState, weakref.ref[torch.optim.Optimizer]] = weakref.WeakKeyDictionary()
# Runs whose length a trainer told; the next trainer is asked again.
_ASKED: weakref.WeakSet[AdapterRun] = weakref.WeakSet()


def owned_by_another(delta: SparseDelta, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a different optimizer has stepped the delta in its present run."""
    owner = _OWNERS.get(delta.state)
    return owner is not None and owner() is not optimizer


def begin_run(delta: SparseDelta) -> None:
    """Start counting steps anew; accumulators of the optimizer's second moments stay."""
    old = delta.state
    # Only a run that has stepped is over: what was gathered for the first step of this one stays.
    if not old.step:
        return
    delta.state = TrainingState(row=old.row, col=old.col)
    if old.finished and old.window is not None and old.window.steps == 0:
        delta.state.window, delta.state.current = old.window, old.current


def join(optimizer: torch.optim.Optimizer, deltas: list[SparseDelta]) -> None:
    """Called before every step with the deltas that `optimizer` is about to step; acts where a run begins or resumes.

    Raises:
        ValueError: the length of the run is needed and unknown; nothing was trained then.
    """
    # A finished run that steps on may be the next `train()` of the same trainer.
    joining = [d for d in deltas if d.state not in _OWNERS or owned_by_another(d, optimizer) or d.state.finished]
    if not joining:
        return
    trainer = running_trainer_state()
    for delta in joining:
        if owned_by_another(delta, optimizer):
            set_total_steps(delta.run, delta.run.config.total_steps)
        if _begins_anew(delta, optimizer, trainer is not None and trainer.global_step == 0):
            begin_run(delta)
    for run in {delta.run: None for delta in joining if delta.state not in _OWNERS}:
        _learn_total_steps(run, trainer)
        _decide_freshness(run)
    for delta in joining:
        _OWNERS[delta.state] = weakref.ref(optimizer)


def _begins_anew(delta: SparseDelta, optimizer: torch.optim.Optimizer, trainer_starts: bool) -> bool:
    """Whether this step is the first of a new run, not the next one of the run that the delta's state is of."""
    if delta.state not in _OWNERS:
        # Loaded with its training state: to be resumed, unless that run was over.
        return delta.state.finished or trainer_starts
    return owned_by_another(delta, optimizer) or (delta.state.finished and trainer_starts)


def _decide_freshness(run: AdapterRun) -> None:
    deltas = run.deltas()
    undecided = [delta for delta in deltas if delta.state.fresh is None]
    if undecided:
        fresh = not any(bool(delta.values.detach().any()) for delta in deltas)
        for delta in undecided:
            delta.state.fresh = fresh


def _learn_total_steps(run: AdapterRun, trainer: Any) -> None:
    if trainer is not None and (run.total_steps is None or run in _ASKED):
        run.total_steps = int(trainer.max_steps)
        _ASKED.add(run)
    if run.total_steps is None:
        # A resumed run is as long as it was.
        run.total_steps = max(delta.state.total_steps for delta in run.deltas()) or None
    if run.total_steps is None and run.config.stop_regrowing_at < 1.0:
        raise ValueError(
            f"stop_regrowing_at={run.config.stop_regrowing_at} is a fraction of total_steps, and nothing says how long "
            "this run is: set total_steps in SpIELConfig, or pass it to SpIELOptimizer or SpIELCallback"
        )


def check_total_steps(total_steps: int | None) -> None:
    """Raise a ValueError unless `total_steps` is a positive int, or None."""
    if total_steps is not None and (
        isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1
    ):
        raise ValueError(f"total_steps must be a positive int (optimizer steps of the run), got {total_steps!r}")


def set_total_steps(run: AdapterRun, total_steps: int | None) -> None:
    """Somebody says how long the run is; None: nobody knows yet."""
    run.total_steps = total_steps
    _ASKED.discard(run)
