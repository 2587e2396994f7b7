"""One cell: a training run of the plan, done and measured, with its result as JSON.

``python -m benchmarks.quality.cell SPEC PATH`` runs the cell that the JSON text SPEC describes, in this process, so
that peak memory is its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..environment import save
from . import methods
from .tasks import TASKS, Task
from .training import DivergedError, Setup, train

CURVE_POINTS = 6
CURVE_ROWS = 64
# Methods whose number of trained values is their own and not the budget's.
WITHOUT_BUDGET = ("base", "full", "bitfit", "ia3")


@dataclass(frozen=True)
class Cell:
    """One run of the plan; it can be converted to JSON and back.

    Attributes:
        study: the part of the plan that it belongs to; "finals" alone read the test split.
        tier, task: what is trained and on what, see `benchmarks.quality.tasks.TASKS`.
        method: the plan's name for the settings.
        settings: of the method, see `benchmarks.quality.methods`.
        r: the budget as a rank of LoRA.
        rate: the highest learning rate; 0 for the bare base model.
        seed: of the order of the batches, the classifier and all random choices.
        steps: optimizer steps.
    """

    study: str
    tier: str
    task: str
    method: str
    settings: dict[str, Any]
    r: int
    rate: float
    seed: int
    steps: int

    @staticmethod
    def from_json(text: str) -> Cell:
        return Cell(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def name(self) -> str:
        """A path below the results' folder, without suffix. Equal cells have equal names, others do not."""
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()[:8]
        label = f"{self.method}_lr{self.rate:.2g}_s{self.seed}_{digest}"
        return f"{self.tier}_{self.task}_r{self.r}/{self.study}/{re.sub(r'[^A-Za-z0-9_.+-]+', '-', label)}"


def run(cell: Cell) -> dict[str, Any]:
    """Train a cell and measure it.

    Raises:
        RuntimeError: the method trains another number of values than the budget says; nothing was trained then.
    """
    began = time.process_time()
    torch.set_num_threads(1)
    torch.manual_seed(cell.seed)
    task = TASKS[cell.tier, cell.task]()
    base = task.model()
    linear = sum(m.weight.numel() for name, m in base.named_modules() if _is_target(base, task, name, m))
    result: dict[str, Any] = {**asdict(cell), "diverged_at": None, "curve": []}
    if cell.method == "base":
        result |= {"trained_values": 0, "head_values": 0, "density": 0.0, "train_seconds": 0.0}
        return result | _measured(cell, task, base) | _costs(began)
    expected = methods.lora_values(base, task, cell.r)
    setup = methods.set_up(base, task, cell.settings, cell.r, cell.steps, cell.rate, cell.seed)
    if cell.settings["kind"] not in WITHOUT_BUDGET and setup.values != expected:
        raise RuntimeError(f"{cell.method} trains {setup.values} values, LoRA of rank {cell.r} {expected}")
    result |= {
        "trained_values": setup.values,
        "head_values": sum(p.numel() for p in setup.head.values()),
        "density": setup.values / linear,
    }
    result |= _trained(cell, task, setup, result["curve"])
    if result["diverged_at"] is None:
        result |= _measured(cell, task, setup.model)
    return result | _costs(began)


def _is_target(base: Any, task: Task, name: str, module: torch.nn.Module) -> bool:
    if not isinstance(module, torch.nn.Linear) or module is base.get_output_embeddings():
        return False
    return task.targets == "all-linear" or re.fullmatch(str(task.targets), name) is not None


def _trained(cell: Cell, task: Task, setup: Setup, curve: list[dict[str, float]]) -> dict[str, Any]:
    """Train, filling the curve; returns seconds and the step of a loss that was not finite, if any."""
    # Processor time: what else runs on the machine, and a queue that is stopped for a while, count for less.
    scoring = 0.0
    losses: list[float] = []
    points = {math.ceil(cell.steps * i / CURVE_POINTS) for i in range(1, CURVE_POINTS + 1)}

    def note(step: int, loss: float) -> None:
        nonlocal scoring
        losses.append(loss)
        if step in points:
            paused = time.process_time()
            scores = task.scores(setup.model, "validation", CURVE_ROWS)
            curve.append({"step": step, "train_loss": sum(losses) / len(losses), "validation_loss": scores["loss"]})
            losses.clear()
            scoring += time.process_time() - paused

    diverged, began = None, time.process_time()
    settings = cell.settings
    try:
        train(
            setup,
            task,
            seed=cell.seed,
            steps=cell.steps,
            rate=cell.rate,
            decay=_decay(cell),
            micro_batches=settings.get("micro_batches", 1),
            on_step=note,
        )
    except DivergedError as found:
        diverged = found.step
    return {"diverged_at": diverged, "train_seconds": time.process_time() - began - scoring}


def _decay(cell: Cell) -> float:
    """AdamW's weight decay: as given, or such that `decay_left` of a delta that gets no gradient is left at the end.

    Under a linearly falling rate the factors (1 - rate decay) come to exp(-rate decay steps / 2).
    """
    left = cell.settings.get("decay_left")
    if left is None:
        return cell.settings.get("decay", 0.0)
    return -2.0 * math.log(left) / (cell.rate * cell.steps)


def _measured(cell: Cell, task: Task, model: Any) -> dict[str, Any]:
    """Scores at the end of the run. Only finals see the test split, so that no choice can have been made by it."""
    scores = {"validation": task.scores(model, "validation")}
    if cell.study == "finals":
        scores["test"] = task.scores(model, "test")
    return {"scores": scores | ({"forgetting": forgetting} if (forgetting := task.forgetting_scores(model)) else {})}


def _costs(began: float) -> dict[str, Any]:
    """The whole process's processor seconds and its peak resident memory (Linux counts it in KiB)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": time.process_time() - began, "peak_mib": peak}


if __name__ == "__main__":
    _cell, _path = Cell.from_json(sys.argv[1]), Path(sys.argv[2])
    save(_path.name, run(_cell), _path.parent, "cpu")
