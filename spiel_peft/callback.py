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
    """Sets the exact length of the run and logs every close when it happens. The cycle runs without this callback too.

    It logs `spiel/rate` (share of the deltas that the close could replace), `spiel/replaced` and `spiel/kept` (numbers
    of deltas), `spiel/churn` (share of the deltas that moved) and `spiel/mean_abs_delta`.

    Args:
        total_steps: optimizer steps of the run; None: the config's, else the trainer's `max_steps`.

    Raises:
        ValueError: `total_steps` is no positive int; or, when training starts, the trainer's optimizer holds no values
            of the model's deltas.
    """

    def __init__(self, *, total_steps: int | None = None) -> None:
        check_total_steps(total_steps)
        self.total_steps = total_steps
        self._runs: list[AdapterRun] = []
        self._logged: dict[int, int] = {}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        # The trainer may have cast the deltas to bfloat16. Data-parallel wrapping looks at dtypes after this call.
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
        # Logging an entry resets `should_log`, and the trainer's own entry for this step would be left out.
        should_log = control.should_log
        for run in self._runs:
            for report in run.log[self._logged.get(id(run), 0) :]:
                _log(state, report)
            self._logged[id(run)] = len(run.log)
        control.should_log = should_log


def _log(state: TrainerState, report: CycleReport) -> None:
    """Log a close as a separate entry: setting `should_log` would change the steps over which the loss is averaged."""
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
        # The method of the base class, because those of subclasses add their metrics to the entry and reset them.
        Trainer.log(trainer, entry)
    else:
        state.log_history.append({**entry, "epoch": state.epoch, "step": state.global_step})
