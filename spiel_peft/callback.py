"""`SpIELCallback`: exact run length and cycle logs for `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .cycle.attach import attach
from .cycle.engine import begin_run
from .delta import AdapterRun, SparseDelta


class SpIELCallback(TrainerCallback):
    """Optional: the cycle runs without it. It knows the exact number of steps and logs every close.

    Logged are `spiel/replaced`, `spiel/kept` (numbers of deltas), `spiel/churn` (share that moved) and
    `spiel/mean_abs_delta`.

    Args:
        total_steps: optimizer steps of the run; the trainer's `max_steps` by default.

    Raises:
        ValueError: at the start of training, if the trainer's optimizer holds no SpIEL values.
    """

    def __init__(self, *, total_steps: int | None = None) -> None:
        if total_steps is not None and (isinstance(total_steps, bool) or total_steps < 1):
            raise ValueError(f"total_steps must be a positive int (optimizer steps of the run), got {total_steps!r}")
        self.total_steps = total_steps
        self._runs: list[AdapterRun] = []
        self._logged: dict[int, int] = {}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        # After a trainer's cast to bf16, before data-parallel wrapping looks at dtypes.
        for module in model.modules() if model is not None else ():
            if isinstance(module, SparseDelta):
                module.restore_dtype()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        inner = _innermost(optimizer)
        total_steps = self.total_steps if self.total_steps is not None else (state.max_steps or None)
        self._runs = attach(inner, model, total_steps)
        if state.global_step == 0:
            for delta in (delta for run in self._runs for delta in run.deltas()):
                begin_run(delta)
            for run in self._runs:
                run.total_steps = total_steps
        self._logged = {id(run): len(run.log) for run in self._runs}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if any(len(run.log) > self._logged.get(id(run), 0) for run in self._runs):
            # Logs are written in on_log, so that they carry the trainer's loss and reach every reporter.
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        for run in self._runs:
            new = run.log[self._logged.get(id(run), 0) :]
            self._logged[id(run)] = len(run.log)
            if not new:
                continue
            last = new[-1]
            entry = {
                "spiel/replaced": last.replaced,
                "spiel/kept": last.kept,
                "spiel/churn": last.churn,
                "spiel/mean_abs_delta": last.mean_abs_delta,
            }
            if logs is not None:
                logs.update(entry)
            if state.log_history:
                state.log_history[-1].update(entry)


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """Unwrap accelerate's and our own wrappers."""
    while True:
        inner = getattr(optimizer, "optimizer", None) or getattr(optimizer, "base_optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer):
            return optimizer
        optimizer = inner
