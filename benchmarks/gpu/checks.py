"""Runs the tests that need a GPU, and keeps the outcome of each as it comes.

The tests run in a process of their own, ``python -m benchmarks.gpu.checks FILE ARGUMENTS``, which writes a line for
each to a file. When a test ends that process, or loses it its GPU, another one takes the tests that are left.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .running import DEVICE_LOST, Context, device_works, process_group

if TYPE_CHECKING:
    import pytest

_POLL_SECONDS = 1.0
# A test that takes longer is taken to hang.
_STUCK_SECONDS = 25.0
_MESSAGE_CHARACTERS = 1500
# Exit statuses of pytest: all passed, some failed, no tests were chosen.
_ENDED = (0, 1, 5)


def gpu_tests(marker: str) -> Callable[[Context], None]:
    """A measurement that runs the GPU tests which this expression of markers chooses."""
    return lambda context: run_tests(context, ["tests/gpu", "-m", marker])


def run_tests(context: Context, arguments: Sequence[str]) -> None:
    """Run tests until all have ended or the clock has run out; keeps what `summary` returns, and ``ended``."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes, output = Path(folder) / "outcomes", Path(folder) / "output"
        outcomes.touch()
        context.keep(**summary([]))
        begun = -1
        # A process that has begun no test will not do so in a second try.
        while (count := len(begun_in(read_lines(outcomes)))) > begun:
            begun = count
            ended = _run_process(context, outcomes, output, arguments)
            if ended is not None:
                context.keep(ended=ended)
                return
        context.keep(ended=f"the process could not run: {output.read_text(errors='replace')[-_MESSAGE_CHARACTERS:]}")


def _run_process(context: Context, outcomes: Path, output: Path, arguments: Sequence[str]) -> str | None:
    """Run the tests that have not begun; returns how they have ended, or None if another process has to go on."""
    command = [sys.executable, "-m", "benchmarks.gpu.checks", str(outcomes), *arguments]
    # Starting the process may take long, so a test is waited for only when a line has come.
    lines, since, stuck = read_lines(outcomes), float("inf"), False
    with output.open("wb") as stream, process_group(command, stdout=stream, stderr=stream) as process:
        while (status := process.poll()) is None and not context.clock.expired() and not stuck:
            time.sleep(_POLL_SECONDS)
            if (found := read_lines(outcomes)) != lines:
                lines, since = found, time.monotonic()
                context.keep(**summary(lines))
            stuck = time.monotonic() - since > _STUCK_SECONDS
    lines = read_lines(outcomes)
    if status not in (*_ENDED, DEVICE_LOST) and (status is not None or stuck):
        why = (
            f"no end after {_STUCK_SECONDS:.0f} s" if stuck else f"the process of the tests ended with status {status}"
        )
        lines = _with_failure(lines, f"{why}\n{output.read_text(errors='replace')[-_MESSAGE_CHARACTERS:]}")
        outcomes.write_text("".join(json.dumps(line) + "\n" for line in lines))
    context.keep(**summary(lines))
    if status in _ENDED:
        return "all have run"
    return "the time was up" if context.clock.expired() else None


def _with_failure(lines: list[dict[str, Any]], message: str) -> list[dict[str, Any]]:
    """The lines of a process that ended in the middle of a test, which has failed thereby."""
    return [
        {"test": line["test"], "outcome": "failed", "seconds": 0.0, "message": message} if line.get("begun") else line
        for line in lines
    ]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The last line that was written for each test, in the order in which they began."""
    lines: dict[str, dict[str, Any]] = {}
    for text in path.read_text().splitlines(keepends=True):
        if text.endswith("\n"):  # the last line may be half written
            line = json.loads(text)
            lines[line["test"]] = line
    return list(lines.values())


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts by outcome; seconds of each test that passed; message of each that did not; tests that did not end."""
    ended = [line for line in lines if "outcome" in line]
    counts = {name: sum(line["outcome"] == name for line in ended) for name in ("passed", "failed", "skipped")}
    return {
        **counts,
        "failures": [line for line in ended if line["outcome"] == "failed"],
        "skips": {line["test"]: line["message"] for line in ended if line["outcome"] == "skipped"},
        "seconds_of_passed": {line["test"]: line["seconds"] for line in ended if line["outcome"] == "passed"},
        "unfinished": [line["test"] for line in lines if line.get("begun")],
        "not_begun": [line["test"] for line in lines if line.get("chosen")],
    }


def begun_in(lines: Sequence[dict[str, Any]]) -> set[str]:
    """The tests that have begun, or could not even be collected."""
    return {line["test"] for line in lines if not line.get("chosen")}


class Recorder:
    """A plugin of pytest that writes a line when a test is chosen, when it begins, and when it has ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begun = begun_in(read_lines(path))
        self._reports: list[pytest.TestReport] = []

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        begun = [item for item in items if item.nodeid in self._begun]
        config.hook.pytest_deselected(items=begun)
        items[:] = [item for item in items if item.nodeid not in self._begun]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            message = report.longreprtext[-_MESSAGE_CHARACTERS:]
            self._write({"test": report.nodeid, "outcome": "failed", "seconds": 0.0, "message": message})

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            self._write({"test": item.nodeid, "chosen": True})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._reports = []
        self._write({"test": nodeid, "begun": True})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcomes = {report.outcome for report in self._reports}
        outcome = next((name for name in ("failed", "skipped") if name in outcomes), "passed")
        line = {"test": nodeid, "outcome": outcome, "seconds": sum(report.duration for report in self._reports)}
        if outcome != "passed":
            texts = [_reason(report) for report in self._reports if report.outcome == outcome]
            line["message"] = "\n".join(texts)[-_MESSAGE_CHARACTERS:]
        self._write(line)
        if outcome == "failed" and not _gpu_works():
            # All tests after this one would fail in this process.
            os._exit(DEVICE_LOST)

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def _reason(report: pytest.TestReport) -> str:
    """Why a test has failed or was skipped."""
    if isinstance(report.longrepr, tuple):  # of a skipped test: file, line, reason
        return str(report.longrepr[2])
    return report.longreprtext


def _gpu_works() -> bool:
    import torch

    return not torch.cuda.is_available() or device_works(torch.device("cuda"))


if __name__ == "__main__":
    import pytest

    file, *arguments = sys.argv[1:]
    options = ["-q", "--tb=short", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    sys.exit(pytest.main([*options, *arguments], plugins=[Recorder(Path(file))]))
