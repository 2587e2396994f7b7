"""What a backward pass contributes to a cycle: candidates of the open window and their gradients."""

from __future__ import annotations

import functools
import math
import warnings
import weakref

import torch
from torch import Tensor

from spiel_kernels.fold import accumulation_dtype

from ..delta import AdapterRun, SparseDelta
from ..training_state import CandidateWindow, StepGradient
from ..weight_gradients import WeightGradient
from .data_parallel import is_chosen, ranks_of
from .growth_registry import get_growth_criterion
from .optimizer_state import seek
from .replicas import queue_average
from .schedule import in_window, is_skipped, next_close, regrow_rate
from .zero import refuse_deepspeed

_PROBES = 16
_COMMON_PROBES = 256
# Runs whose user has been told that nobody steps their deltas.
_WARNED_UNHELD: weakref.WeakSet[AdapterRun] = weakref.WeakSet()


class WindowCollector:
    """Opens windows and fills them with what backward passes bring (a `spiel_peft.delta.Collector`)."""

    def wanted(self, delta: SparseDelta, gradient: WeightGradient) -> Tensor | None:
        """The candidates at which the open window, if any, wants this use's gradient; opens one that is due."""
        if not delta.state.sought:
            seek(delta)
        refuse_deepspeed(delta, is_chosen(delta))
        queue_average(delta)
        _note_accumulation(delta)
        state = delta.state
        if state.window is None and ranks_of(delta) is not None:
            return _proposed(delta, gradient)
        if not gathers_at(delta, state.step):
            return None
        if state.window is None:
            positions = gradient.topk(candidate_count(delta))
            if positions.numel() == 0:
                return None  # an expert without tokens, a batch without labels: the next backward chooses
            dtype = accumulation_dtype(delta.values)
            zeros = torch.zeros(positions.numel(), dtype=dtype, device=positions.device)
            state.window = CandidateWindow(positions.to(delta.indices.dtype), zeros, zeros.clone())
        return state.window.positions

    def collect(self, delta: SparseDelta, active: Tensor, candidates: Tensor) -> None:
        """Add what was gathered: at the active positions ``[k]`` and at the candidates ``[c]``."""
        current = delta.state.current
        if current.pending is None or current.probe_sums is None:
            dtype = accumulation_dtype(delta.values)
            current.pending = torch.zeros(candidates.shape, dtype=dtype, device=candidates.device)
            if ranks_of(delta) is not None:
                current.probe = common_probe(delta)
                current.probe_sums = torch.zeros(current.probe.shape, dtype=dtype, device=active.device)
            else:
                current.probe = torch.topk(active.abs(), min(_PROBES, delta.k)).indices
                current.probe_sums = torch.zeros_like(active[current.probe])
        current.pending += candidates
        current.probe_sums += active[current.probe]


def _proposed(delta: SparseDelta, gradient: WeightGradient) -> Tensor | None:
    """The positions that this rank proposes as candidates, found in the first backward pass of the step."""
    current = delta.state.current
    if not proposes_at(delta, delta.state.step):
        return None
    if current.proposed is None:
        positions = gradient.topk(candidate_count(delta))
        if positions.numel() == 0:
            return None
        current.proposed = positions.to(delta.indices.dtype)
    return current.proposed


def candidate_count(delta: SparseDelta) -> int:
    """How many candidates a window of this delta chooses; at most k."""
    state, run, config = delta.state, delta.run, delta.run.config
    per_grown = get_growth_criterion(config.growth).candidates_per_grown
    # Whether the first close replaces all deltas is known only after the first step.
    if per_grown is None or run.total_steps is None or (state.closes == 0 and state.fresh is not False):
        return delta.k
    close = next_close(state.step, config.regrow_every, config.accumulation_steps)
    rate = regrow_rate(config.regrow_schedule, config.initial_regrow_rate, close, run.total_steps)
    return min(delta.k, math.ceil(per_grown * math.floor(rate * delta.k)))


def common_probe(delta: SparseDelta) -> Tensor:
    """Slots of some active deltas, the same on every rank, whatever gradients it has."""
    count = min(_COMMON_PROBES, delta.k)
    return torch.arange(count, device=delta.values.device) * delta.k // count


def gathers_at(delta: SparseDelta, done: int) -> bool:
    """Whether the step after `done` finished ones belongs to an accumulation window."""
    run, config = delta.run, delta.run.config
    if delta.state.finished and done == delta.state.total_steps:
        done = 0  # if anything follows, it is the first step of another run
    if not get_growth_criterion(config.growth).gathers:
        return False
    return _is_gathering_step(
        done, config.regrow_every, config.accumulation_steps, run.total_steps, config.stop_regrowing_at
    )


@functools.lru_cache(maxsize=64)  # every delta asks in every backward pass
def _is_gathering_step(
    done: int, regrow_every: int, accumulation_steps: int, total_steps: int | None, stop_regrowing_at: float
) -> bool:
    if not in_window(done, regrow_every, accumulation_steps):
        return False
    return not is_skipped(next_close(done, regrow_every, accumulation_steps), total_steps, stop_regrowing_at)


def proposes_at(delta: SparseDelta, done: int) -> bool:
    """Whether, among several ranks, the step after `done` finished ones is one to propose candidates in.

    That is the step before a window or, where that belongs to another window or there is none, one in the window.
    """
    return delta.state.window is None and (gathers_at(delta, done) or gathers_at(delta, done + 1))


def _note_accumulation(delta: SparseDelta) -> None:
    """Notice when gradients were thrown away without a step: what was collected for that step goes with them."""
    state = delta.state
    task = torch._C._current_graph_task_id()
    if task != state.current.graph_task and _gradient_is_clear(delta):
        drop_step(delta)
        state.unheld_steps += 1
        if state.unheld_steps == delta.run.config.regrow_every + 1:
            _warn_unheld(delta)
    state.current.graph_task = task


def _gradient_is_clear(delta: SparseDelta) -> bool:
    grad, current = delta.values.grad, delta.state.current
    if grad is None:
        return True
    if current.probe is None or current.probe_sums is None:
        return False
    # zero_grad(set_to_none=False) leaves zeros behind.
    return bool((grad[current.probe] == 0).all()) and bool((current.probe_sums != 0).any())


def drop_step(delta: SparseDelta) -> None:
    """Forget the step in progress. A window that it would have opened chooses its candidates anew."""
    delta.state.current = StepGradient()
    window = delta.state.window
    if window is not None and window.steps == 0 and not window.shared:
        delta.state.window = None


def _warn_unheld(delta: SparseDelta) -> None:
    if delta.run in _WARNED_UNHELD:
        return
    _WARNED_UNHELD.add(delta.run)
    warnings.warn(
        f"The deltas of adapter {delta.run.adapter_name!r} have been given gradients for a whole cycle "
        f"({delta.run.config.regrow_every} accumulations) while no torch.optim.Optimizer stepped them: the cycle does "
        "not run. Pass the model's trainable parameters to the optimizer after get_peft_model.",
        stacklevel=2,
    )
