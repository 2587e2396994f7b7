"""Parts of a long benchmark: each keeps what it has measured, and what goes wrong in one stays there."""

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

from .environment import load, save
from .timing import Clock

# What a part may exceed its share by before its process is taken to hang.
GRACE_SECONDS = 45.0
# What all parts together may exceed the budget by.
OVERRUN_SECONDS = 45.0
_POLL_SECONDS = 0.2

STATUS, DONE, RUNNING, FAILED = "status", "done", "running", "failed"
REASON = "reason"  # why a part failed


@dataclass(frozen=True)
class Part:
    """A part of a benchmark.

    Attributes:
        name: of the part; its result is the file ``<prefix>_<name>``.
        weight: its share of the time, relative to the other parts.
        run: measures; keeps what it has in `Context.keep` as it goes.
    """

    name: str
    weight: float
    run: Callable[[Context], None]


@dataclass
class Context:
    """What a part runs with.

    Attributes:
        device: where to measure.
        tiny: small sizes, to try the benchmark itself.
        clock: begin nothing new once it has run out.
        result: what has been measured so far.
    """

    device: torch.device
    tiny: bool
    clock: Clock
    save: Callable[[dict[str, Any]], None] = field(repr=False, default=lambda result: None)
    result: dict[str, Any] = field(default_factory=dict)

    def keep(self, **entries: Any) -> None:
        """Add to the result and write it down at once."""
        self.result.update(entries)
        self.save(self.result)


@dataclass(frozen=True)
class Place:
    """Where the results of a benchmark's parts lie, and on which device they are measured."""

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
        """Whether the part was measured to its end, or as far as its time went; failed parts are tried again."""
        result = self.result(part)
        return result is not None and result[STATUS] == DONE

    def ended_since(self, part: str, moment: float) -> bool:
        """Whether the part has ended, well or not, after a moment in seconds since the epoch."""
        path = self.folder / f"{self.file_name(part)}.json"
        if not path.is_file() or path.stat().st_mtime < moment:
            return False
        result = self.result(part)
        return result is not None and result[STATUS] != RUNNING

    def add_failure(self, part: str, moment: float, reason: str) -> None:
        """Note that the process of a part is gone, beside what the part had measured after a moment."""
        path = self.folder / f"{self.file_name(part)}.json"
        fresh = path.is_file() and path.stat().st_mtime >= moment
        measured = (self.result(part) if fresh else None) or {}
        self.save(part, {**measured, STATUS: FAILED, REASON: reason})


def run_part(part: Part, place: Place, clock: Clock) -> dict[str, Any]:
    """Run one part; whatever it raises is kept in its result."""
    context = Context(torch.device(place.device), place.tiny, clock)
    context.save = lambda result: place.save(part.name, {STATUS: RUNNING, **result})
    context.keep()
    try:
        part.run(context)
        outcome = {STATUS: DONE}
    except Exception as error:
        outcome = {
            STATUS: FAILED,
            REASON: f"{type(error).__name__}: {error}"[:500],
            "traceback": traceback.format_exc().splitlines(),
        }
    outcome["took_seconds"] = clock.elapsed()
    result = {**context.result, **outcome}
    place.save(part.name, result)
    return result


def run_parts(parts: Sequence[Part], place: Place, clock: Clock) -> None:
    """Run parts in order, here; each gets its share of the time left, and what one leaves over goes to the next."""
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
    """Run parts in another process; one that hangs, or takes its process down, costs only itself.

    A fault on a GPU spoils its process for everything after it, so that too begins a new one.

    Args:
        command: makes the command line that runs parts in order within so many seconds.
    """
    pending = list(parts)
    while pending and not clock.expired():
        began = time.time()
        worker = subprocess.Popen(command(pending, clock.left()), cwd=Path(__file__).parent.parent, env=os.environ)
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
    """Wait for a worker; returns the part it could not end, and why, or None if there is nothing left to do."""
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
