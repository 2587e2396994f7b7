"""What a backward pass contributes to a cycle: candidates of the open window and their gradients."""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import Tensor

from spiel_kernels.fold import accumulation_dtype

from ..delta import AdapterRun, SparseDelta
from ..training_state import CandidateWindow, StepGradient
from ..weight_gradients import WeightGradient
from .growth_registry import get_growth_criterion
from .optimizer_state import seek
from .schedule import in_window, is_skipped, next_close

_PROBES = 16
# Runs whose user has been told that nobody steps their deltas.
_WARNED_UNHELD: weakref.WeakSet[AdapterRun] = weakref.WeakSet()


class WindowCollector:
    """Opens windows and fills them with what backward passes bring (a `spiel_peft.delta.Collector`)."""

    def wanted(self, delta: SparseDelta, gradient: WeightGradient) -> Tensor | None:
        """The candidates at which the open window, if any, wants this use's gradient; opens one that is due."""
        if not delta.state.sought:
            seek(delta)
        _note_accumulation(delta)
        if not _gathers_now(delta):
            return None
        state = delta.state
        if state.window is None:
            positions = gradient.topk(delta.k)
            if positions.numel() == 0:
                return None  # an expert without tokens, a batch without labels: the next backward chooses
            dtype = accumulation_dtype(delta.values)
            zeros = torch.zeros(positions.numel(), dtype=dtype, device=positions.device)
            state.window = CandidateWindow(positions.to(delta.indices.dtype), zeros, zeros.clone())
        return state.window.positions

    def collect(self, delta: SparseDelta, active: Tensor, candidates: Tensor | None) -> None:
        """Add what was gathered: at the active positions ``[k]`` and at the candidates ``[c]``."""
        if candidates is None:
            return
        current = delta.state.current
        if current.pending is None or current.probe_sums is None:
            current.pending = torch.zeros_like(delta.state.window.sums)
            current.probe = torch.topk(active.abs(), min(_PROBES, delta.k)).indices
            current.probe_sums = torch.zeros_like(active[current.probe])
        current.pending += candidates
        current.probe_sums += active[current.probe]


def _gathers_now(delta: SparseDelta) -> bool:
    run, config, done = delta.run, delta.run.config, delta.state.step
    if delta.state.finished and done == delta.state.total_steps:
        done = 0  # if anything follows, it is the first step of another run
    if not get_growth_criterion(config.growth).gathers:
        return False
    if not in_window(done, config.regrow_every, config.accumulation_steps):
        return False
    close = next_close(done, config.regrow_every, config.accumulation_steps)
    return not is_skipped(close, run.total_steps, config.stop_regrowing_at)


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
    if delta.state.window is not None and delta.state.window.steps == 0:
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
