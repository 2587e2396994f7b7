"""`SpIELCallback`: exact run length and cycle logs for `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .call_stack import running_trainer
from .cycle.close import CycleReport
from .cycle.engine import attach
from .cycle.runs import begin_run, check_total_steps, set_total_steps
from .delta import AdapterRun, SparseDelta


class SpIELCallback(TrainerCallback):
    """Optional: the cycle runs without it. It knows the exact number of steps and logs every close as it happens.

    Logged are `spiel/rate` (share offered for replacement), `spiel/replaced`, `spiel/kept` (numbers of deltas),
    `spiel/churn` (share that moved) and `spiel/mean_abs_delta`.

    Args:
        total_steps: optimizer steps of the run; by default the config's, else the trainer's `max_steps`.

    Raises:
        ValueError: at the start of training, if the trainer's optimizer holds no SpIEL values.
    """

    def __init__(self, *, total_steps: int | None = None) -> None:
        check_total_steps(total_steps)
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
        self._runs = attach(optimizer, model, self.total_steps)
        for run in self._runs:
            if state.global_step == 0:
                for delta in run.deltas():
                    begin_run(delta)
            if self.total_steps is None and run.config.total_steps is None:
                set_total_steps(run, state.max_steps or None)
        self._logged = {id(run): len(run.log) for run in self._runs}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # The handler of an entry takes the trainer's own, still to come, for done.
        should_log = control.should_log
        for run in self._runs:
            for report in run.log[self._logged.get(id(run), 0) :]:
                _log(state, report)
            self._logged[id(run)] = len(run.log)
        control.should_log = should_log


def _log(state: TrainerState, report: CycleReport) -> None:
    """An entry of its own: asking the trainer to log would shift the spans over which it averages the loss."""
    entry = {
        "spiel/rate": report.rate,
        "spiel/replaced": report.replaced,
        "spiel/kept": report.kept,
        "spiel/churn": report.churn,
        "spiel/mean_abs_delta": report.mean_abs_delta,
    }
    from transformers import Trainer

    trainer = running_trainer()
    if isinstance(trainer, Trainer):
        # The base class's own: subclasses add what they have gathered since their last entry, and forget it.
        Trainer.log(trainer, entry)
    else:
        state.log_history.append({**entry, "epoch": state.epoch, "step": state.global_step})
