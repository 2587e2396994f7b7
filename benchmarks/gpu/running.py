"""Runs the measurements of one part: a process takes them in order and is replaced when one of them breaks it.

What is known of each measurement is written at once to the part's one result file. So an exception, a crash, a hang or
the end of the time costs the measurement that met it, and no other.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..environment import failure, load, save
from ..timing import Clock

# A measurement may exceed its time by this much, then its process is ended. So may a part.
GRACE_SECONDS = 10.0
# Until a process begins its first measurement: it imports PyTorch, transformers and PEFT.
START_SECONDS = 60.0
_POLL_SECONDS = 0.2
# Exit status of a process that has recorded a failure after which its GPU can no longer be used.
DEVICE_LOST = 75
_STDERR_CHARACTERS = 2000

STATUS, REASON = "status", "reason"
NOT_BEGUN, RUNNING, DONE, FAILED, SKIPPED = "not begun", "running", "done", "failed", "skipped"


@dataclass(frozen=True)
class Measurement:
    """One measurement of a part.

    Attributes:
        seconds: it begins nothing new after so long, and is ended `GRACE_SECONDS` later.
        run: measures, and calls `Context.keep` as it goes.
    """

    name: str
    seconds: float
    run: Callable[[Context], None]


@dataclass(frozen=True)
class Part:
    """Measurements, the most important first, that share a result file and a time in seconds."""

    name: str
    seconds: float
    measurements: tuple[Measurement, ...]


@dataclass
class Context:
    """Passed to a measurement when it runs.

    Attributes:
        device: where to measure.
        tiny: small sizes, to try the benchmark itself.
        clock: a measurement begins nothing new once it has run out.
        save: writes the result.
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


class Record:
    """The result file of a part, complete at any moment; the supervising process and its worker take turns to write."""

    def __init__(self, folder: Path, part: Part, rehearsal: bool) -> None:
        self.folder, self.part, self.rehearsal = folder, part, rehearsal
        self.name = f"gpu_rehearsal_{part.name}" if rehearsal else f"gpu_{part.name}"

    def begin(self) -> None:
        """Write the file with no measurement begun."""
        self._save({"measurements": {m.name: {STATUS: NOT_BEGUN} for m in self.part.measurements}})

    def entries(self) -> dict[str, dict[str, Any]]:
        """What is known of each measurement, by name."""
        return (load(self.name, self.folder) or {})["measurements"]

    def with_status(self, status: str) -> list[Measurement]:
        """The measurements that have this status, in order."""
        entries = self.entries()
        return [m for m in self.part.measurements if entries[m.name][STATUS] == status]

    def update(self, name: str, entry: dict[str, Any], device: torch.device | None = None) -> None:
        """Replace what is known of a measurement.

        Args:
            device: that the file names; None leaves the description of the machine as it is.
        """
        result = load(self.name, self.folder) or {}
        result["measurements"][name] = entry
        if device is not None:
            result = {"measurements": result["measurements"]}
        self._save(result, device)

    def end(self, name: str, status: str, reason: str) -> None:
        """Give a measurement a status and its reason, and keep what it has measured."""
        self.update(name, {**self.entries()[name], STATUS: status, REASON: reason})

    def _save(self, result: dict[str, Any], device: torch.device | None = None) -> None:
        # The supervising process must not use the GPU, whose memory is measured, so it describes the CPU.
        described = {"part": self.part.name, "rehearsal": self.rehearsal, **result}
        save(self.name, described, self.folder, str(device or "cpu"))


def device_works(device: torch.device) -> bool:
    """Whether this process can still use a GPU; after an illegal memory access, for one, it cannot."""
    try:
        torch.ones(8, device=device).sum().item()
    except Exception:
        return False
    return True


def _tidied(tidy_up: Callable[[], None], device: torch.device) -> bool:
    """Tidy up after a measurement; returns whether the next one can run in this process."""
    try:
        tidy_up()
    except Exception as error:
        print(failure(error), flush=True)
        return False
    return device_works(device)


def run_measurement(measurement: Measurement, record: Record, context: Context) -> dict[str, Any]:
    """Run one measurement and save its result; an exception becomes a failed result with its traceback."""
    clock = Clock(min(measurement.seconds, context.clock.left()))

    def write(result: dict[str, Any]) -> None:
        record.update(measurement.name, {STATUS: RUNNING, **result}, context.device)

    own = Context(context.device, context.tiny, clock, write)
    own.keep()
    try:
        measurement.run(own)
        outcome: dict[str, Any] = {STATUS: DONE}
    except Exception as error:
        outcome = {STATUS: FAILED, REASON: failure(error), "traceback": traceback.format_exc().splitlines()[-12:]}
    result = {**own.result, **outcome, "took_seconds": clock.elapsed()}
    record.update(measurement.name, result, context.device)
    return result


def work(record: Record, context: Context, tidy_up: Callable[[], None] = lambda: None) -> bool:
    """Run in this process the measurements that have not begun, in order, while the time of the context lasts.

    Args:
        tidy_up: is called after each measurement.

    Returns:
        False if the device cannot be used any more after a measurement: another process can run the others.
    """
    for measurement in record.with_status(NOT_BEGUN):
        left = context.clock.left()
        if left < measurement.seconds / 2:
            reason = f"{max(0.0, left):.0f} s were left of the part, and it takes up to {measurement.seconds:.0f} s"
            record.end(measurement.name, SKIPPED, reason)
            print(f"== {measurement.name} skipped: {reason}", flush=True)
            continue
        print(f"== {measurement.name}: up to {min(left, measurement.seconds):.0f} s", flush=True)
        result = run_measurement(measurement, record, context)
        print(f"== {measurement.name} {result[STATUS]} after {result['took_seconds']:.1f} s", flush=True)
        if result[STATUS] == FAILED:
            print(result[REASON], flush=True)
        if not _tidied(tidy_up, context.device):
            return False
    return True


def supervise(record: Record, clock: Clock, command: Callable[[float], list[str]]) -> None:
    """Run a part in a process of its own, and go on in a new one when it crashes, hangs or loses its GPU.

    Args:
        command: makes the command line of a process that calls `work` with this number of seconds.
    """
    record.begin()
    while (pending := record.with_status(NOT_BEGUN)) and clock.left() > 0:
        reason, messages = _run_worker(command(clock.left()), record, clock)
        running = record.with_status(RUNNING)
        if not running and reason and pending == record.with_status(NOT_BEGUN):
            running = pending[:1]  # the process did not get to its first measurement
        for measurement in running:
            reason = reason or "its process has ended"
            record.end(measurement.name, FAILED, f"{reason}\n{messages}".strip())
            print(f"== {measurement.name} failed: {reason}", flush=True)
    for measurement in record.with_status(NOT_BEGUN):
        record.end(measurement.name, SKIPPED, "the time of the part was over")


def _run_worker(command: list[str], record: Record, clock: Clock) -> tuple[str, str]:
    """Run a process to its end, which is brought about if it hangs.

    Returns:
        Why it has ended, empty if as it should; the end of what it has written to its standard error.
    """
    with tempfile.TemporaryFile() as stderr:
        with process_group(command, stderr=stderr) as worker:
            reason = _watch(worker, record, clock)
        stderr.seek(0)
        messages = stderr.read().decode(errors="replace")
    sys.stderr.write(messages)
    return reason, messages[-_STDERR_CHARACTERS:]


def _watch(worker: subprocess.Popen[bytes], record: Record, clock: Clock) -> str:
    """Wait until a process ends or has to be ended; returns why, empty if all is well."""
    current, since = None, time.monotonic()
    while True:
        status = worker.poll()
        if status in (0, DEVICE_LOST):
            return ""
        if status is not None:
            return f"its process ended with status {status}"
        running = next(iter(record.with_status(RUNNING)), None)
        if running is not current:
            current, since = running, time.monotonic()
        took = time.monotonic() - since
        if took > (current.seconds if current else START_SECONDS) + GRACE_SECONDS:
            return f"stopped after {took:.0f} s"
        if clock.left() < -GRACE_SECONDS:
            return f"stopped after {took:.0f} s, as the time of the part was over"
        time.sleep(_POLL_SECONDS)


@contextmanager
def process_group(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in the folder of the checkout; at the end it is killed, with all that it has started."""
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
