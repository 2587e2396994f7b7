"""The queue: runs the cells without a result one after the other, each in a process of its own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from ..environment import RESULTS
from . import plan as plans
from .cell import Cell
from .plan import Results, Stage

FOLDER = RESULTS / "quality"
CHECKOUT = Path(__file__).parents[2]
_SECONDS_PER_HOUR = 3600.0


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every finished cell below a folder, by `Cell.name`."""
    paths = sorted(folder.glob("*/*/*.json"))
    return {path.relative_to(folder).with_suffix("").as_posix(): json.loads(path.read_text()) for path in paths}


def work(folder: Path, plan: dict[str, Any], tier: str | None = None, hours: float | None = None) -> int:
    """Run pending cells until none is left, or until the next one would not be through in time.

    A cell is written when it is through, so killing the queue loses the cell in progress and nothing else.

    Args:
        folder: of the results.
        plan: from `plan.load`.
        tier: only cells of this tier.
        hours: when to stop; None: when all is done.

    Returns:
        How many cells failed; they are tried again by the next call.

    Raises:
        RuntimeError: another queue works on that folder.
    """
    began = time.monotonic()
    failed: set[str] = set()
    with _only_queue(folder):
        while True:
            results = read_results(folder)
            stages = plans.unfold(plan, results)
            seconds = cell_seconds(plan, results)
            cell = next((c for c in plans.pending(stages, results, tier) if c.name not in failed), None)
            if cell is None:
                break
            elapsed = time.monotonic() - began
            if hours is not None and elapsed + seconds[cell.tier] > hours * _SECONDS_PER_HOUR:
                break
            print(f"{time.strftime('%H:%M:%S')} {cell.name}", flush=True)
            if not run_in_process(cell, folder / cell.name):
                failed.add(cell.name)
    return len(failed)


def run_in_process(cell: Cell, path: Path) -> bool:
    """Run one cell in a process of its own, at low priority and with one thread; returns whether it has a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "benchmarks.quality.cell", cell.to_json(), str(path)]
    process = subprocess.Popen(
        command, cwd=CHECKOUT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    # Also where the queue is interrupted: a cell without a queue would go on beside the next queue's.
    try:
        os.setpriority(os.PRIO_PROCESS, process.pid, 10)
        _, errors = process.communicate()
    finally:
        process.kill()
    if process.returncode != 0:
        print(f"failed with exit status {process.returncode}:\n{errors.strip()[-3000:]}", file=sys.stderr, flush=True)
    return process.returncode == 0


def cell_seconds(plan: dict[str, Any], results: Results) -> dict[str, float]:
    """Seconds of a cell by tier: the median of finished cells, or the plan's guess."""
    guesses = {tier: float(entry["cell_seconds"]) for tier, entry in plan["tiers"].items()}
    for tier in guesses:
        measured = [result["seconds"] for result in results.values() if result["tier"] == tier and result["rate"]]
        if measured:
            guesses[tier] = median(measured)
    return guesses


def status(plan: dict[str, Any], results: Results) -> str:
    """What is done, what is left, and how many hours that is."""
    seconds = cell_seconds(plan, results)
    lines = [f"{'study':44} {'done':>5} {'left':>5} {'hours':>6}  waits for"]
    total = [0, 0, 0.0]
    for stage in plans.unfold(plan, results):
        done, left = counts(stage, results)
        hours = left * seconds[stage.tier] / _SECONDS_PER_HOUR
        waits = "; ".join(sorted(stage.waits_for))
        lines.append(f"{stage.title:44} {done:5} {left:5} {hours:6.2f}  {waits}".rstrip())
        total = [total[0] + done, total[1] + left, total[2] + hours]
    lines.append(f"{'all':44} {total[0]:5} {total[1]:5} {total[2]:6.2f}")
    planned = {cell.name for stage in plans.unfold(plan, results) for cell in stage.cells}
    if strays := sorted(results.keys() - planned):
        lines += ["", f"results that the plan does not name (it has changed since): {len(strays)}", *strays]
    return "\n".join(lines)


def counts(stage: Stage, results: Results) -> tuple[int, int]:
    """How many cells of a stage are through, and how many are left, those not known yet included."""
    done = sum(cell.name in results for cell in stage.cells)
    return done, len(stage.cells) - done + stage.unknown


@contextlib.contextmanager
def _only_queue(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".queue").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another queue works on {folder}: wait for it, or stop it") from None
        yield
