"""Runs a long benchmark in parts: each part saves its result as it goes, and its failure does not stop the others."""

from __future__ import annotations

import os
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..environment import failure, load, save
from ..timing import Clock

# A part that exceeds its share by this much is taken to hang, and its process is ended.
GRACE_SECONDS = 45.0
# All parts together may exceed the budget by this much.
OVERRUN_SECONDS = 45.0
_POLL_SECONDS = 0.2

STATUS, DONE, RUNNING, FAILED = "status", "done", "running", "failed"
REASON = "reason"  # why a part failed


@dataclass(frozen=True)
class Part:
    """A part of a benchmark.

    Attributes:
        name: the part's result is the file ``<prefix>_<name>``.
        weight: its share of the time, relative to the other parts.
        run: does the measuring, and saves with `Context.keep` as it goes.
    """

    name: str
    weight: float
    run: Callable[[Context], None]


@dataclass
class Context:
    """Passed to a part when it runs.

    Attributes:
        device: where to measure.
        tiny: small sizes, to try the benchmark itself.
        clock: a part begins no new measurement once it has run out.
        save: writes the result file.
        result: measured so far.
    """

    device: torch.device
    tiny: bool
    clock: Clock
    save: Callable[[dict[str, Any]], None] = field(repr=False, default=lambda result: None)
    result: dict[str, Any] = field(default_factory=dict)

    def keep(self, **entries: Any) -> None:
        """Add entries to the result and save it."""
        self.result.update(entries)
        self.save(self.result)


@dataclass(frozen=True)
class Place:
    """The result files of a benchmark's parts, and the device that they are measured on."""

    folder: Path
    prefix: str
    device: str
    tiny: bool

    def file_name(self, part: str) -> str:
        return f"{self.prefix}_{part}"

    def result(self, part: str) -> dict[str, Any] | None:
        return load(self.file_name(part), self.folder)

    def save(self, part: str, result: dict[str, Any]) -> None:
        save(self.file_name(part), {"tiny": self.tiny, **result}, self.folder, self.device)

    def is_done(self, part: str) -> bool:
        """Whether the part has run to its end or until its time was up; failed parts are not done."""
        result = self.result(part)
        return result is not None and result[STATUS] == DONE

    def ended_since(self, part: str, moment: float) -> bool:
        """Whether the part has ended, in success or failure, after `moment` (seconds since the epoch)."""
        path = self.folder / f"{self.file_name(part)}.json"
        if not path.is_file() or path.stat().st_mtime < moment:
            return False
        result = self.result(part)
        return result is not None and result[STATUS] != RUNNING

    def add_failure(self, part: str, moment: float, reason: str) -> None:
        """Mark a part as failed because its process has ended; keeps what the part has saved after `moment`."""
        path = self.folder / f"{self.file_name(part)}.json"
        fresh = path.is_file() and path.stat().st_mtime >= moment
        measured = (self.result(part) if fresh else None) or {}
        self.save(part, {**measured, STATUS: FAILED, REASON: reason})


def run_part(part: Part, place: Place, clock: Clock) -> dict[str, Any]:
    """Run one part and save its result; an exception becomes a failed result with its traceback."""
    context = Context(torch.device(place.device), place.tiny, clock)
    context.save = lambda result: place.save(part.name, {STATUS: RUNNING, **result})
    context.keep()
    try:
        part.run(context)
        outcome = {STATUS: DONE}
    except Exception as error:
        outcome = {
            STATUS: FAILED,
            REASON: failure(error),
            "traceback": traceback.format_exc().splitlines(),
        }
    outcome["took_seconds"] = clock.elapsed()
    result = {**context.result, **outcome}
    place.save(part.name, result)
    return result


def run_parts(parts: Sequence[Part], place: Place, clock: Clock) -> None:
    """Run parts in order in this process; each gets its share of the time that is left when it begins."""
    for number, part in enumerate(parts):
        if clock.expired():
            return
        share = part.weight / sum(p.weight for p in parts[number:])
        print(f"== {part.name}: up to {clock.left() * share:.0f} s", flush=True)
        result = run_part(part, place, clock.part(share))
        if result[STATUS] == FAILED:
            print(f"== {part.name} failed: {result[REASON]}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def supervise(
    parts: Sequence[Part], place: Place, clock: Clock, command: Callable[[Sequence[Part], float], list[str]]
) -> None:
    """Run parts in a process of their own, and in a new one after a part that crashes or hangs.

    A process cannot use a GPU any more after an illegal memory access, so only a new process can run the other parts.

    Args:
        command: makes the command line of a process that runs these parts in order within this number of seconds.
    """
    pending = list(parts)
    while pending and not clock.expired():
        began = time.time()
        worker = subprocess.Popen(command(pending, clock.left()), cwd=Path(__file__).parents[2], env=os.environ)
        try:
            culprit, reason = _watch(worker, pending, place, clock, began)
        finally:
            worker.kill()
            worker.wait()
        pending = [part for part in pending if not place.ended_since(part.name, began)]
        if culprit is None:
            return
        if culprit in pending:
            place.add_failure(culprit.name, began, reason)
            print(f"== {culprit.name} failed: {reason}", flush=True)
            pending.remove(culprit)


def _watch(
    worker: subprocess.Popen[bytes], pending: Sequence[Part], place: Place, clock: Clock, began: float
) -> tuple[Part | None, str]:
    """Wait for the worker process; returns the part that it did not end and the reason, or None if all have ended."""
    current, since, planned = None, time.monotonic(), 0.0
    while True:
        status = worker.poll()
        waiting = [part for part in pending if not place.ended_since(part.name, began)]
        if not waiting or status == 0:
            return None, ""
        if status is not None:
            return waiting[0], f"its process ended with status {status}"
        if waiting[0] is not current:
            current, since = waiting[0], time.monotonic()
            planned = max(0.0, clock.left()) * current.weight / sum(part.weight for part in waiting)
        took = time.monotonic() - since
        if took > 2 * planned + GRACE_SECONDS or clock.left() < -OVERRUN_SECONDS:
            return current, f"no end after {took:.0f} s, where {planned:.0f} s were planned"
        time.sleep(_POLL_SECONDS)
