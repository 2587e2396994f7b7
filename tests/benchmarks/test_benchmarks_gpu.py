"""The GPU benchmark, at tiny sizes on the CPU; a measurement that fails, crashes or hangs costs no other its result."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmarks_under_test import (
    ROOT,
    bases,
    checks,
    environment,
    gpu,
    gpu_table,
    kernel_times,
    measurements,
    running,
    timing,
    variants,
    worker,
)

CPU = torch.device("cpu")


def context(seconds: float | None = None) -> running.Context:
    return running.Context(CPU, True, timing.Clock(seconds))


def record_of(folder: Path, *measured: running.Measurement, seconds: float = 60.0) -> running.Record:
    record = running.Record(folder, running.Part("some", seconds, measured), True)
    record.begin()
    return record


def without_tests(part: running.Part) -> running.Part:
    """The part with measurements that take as long as is needed, and without starting pytest."""

    def changed(measurement: running.Measurement) -> running.Measurement:
        run = measurement.run
        if measurement.name.startswith("tests_"):
            run = lambda own: own.keep(**checks.summary([]), ended="all have run")  # noqa: E731
        return running.Measurement(measurement.name, 1000.0, run)

    return dataclasses.replace(part, measurements=tuple(changed(m) for m in part.measurements))


@pytest.mark.parametrize("name", ["one", pytest.param("two", marks=pytest.mark.slow)])
def test_a_whole_part(name: str, tmp_path: Path) -> None:
    record = running.Record(tmp_path, without_tests(measurements.PARTS[name]), True)
    record.begin()
    assert running.work(record, context(), worker.tidy_up)
    entries = record.entries()
    assert {entry["status"] for entry in entries.values()} == {"done"}, entries
    for entry in entries.values():
        assert all("failed" not in case for case in entry.get("results", []))
        assert all(set(step["failed"]) <= {"full fine-tuning"} for step in entry.get("steps", []))
        assert all(case["sound"] for case in entry.get("in_place", []))
        if "variant" in entry:
            assert len(entry["first_seconds"]) == variants.FIRST_CLOSE + 1
            assert entry["seconds"] and entry["profile"]["kernels"] and entry["trainable"]
    table = gpu_table.gpu_table(entries)
    assert table.count("| done in") == len(entries)
    # One file, which names its machine.
    assert [path.name for path in tmp_path.iterdir()] == [f"gpu_rehearsal_{name}.json"]
    stored = environment.load(f"gpu_rehearsal_{name}", tmp_path)
    assert stored["part"] == name and stored["rehearsal"] and stored["date"] and stored["device"]


def test_parts_end_in_time() -> None:
    """Four and five minutes, with the imports of the supervising process and the grace of what hangs."""
    for part, minutes in ((measurements.ONE, 4), (measurements.TWO, 5)):
        assert part.seconds + running.GRACE_SECONDS + 10 < 60 * minutes
        # The worker starts in this time too.
        assert sum(measurement.seconds for measurement in part.measurements) + 10 <= part.seconds


def fail(own: running.Context) -> None:
    own.keep(half=1)
    raise RuntimeError("out of memory")


def fine(own: running.Context) -> None:
    own.keep(value=2)


def test_a_failure_keeps_what_was_measured(tmp_path: Path) -> None:
    record = record_of(tmp_path, running.Measurement("bad", 9, fail), running.Measurement("good", 9, fine))
    assert running.work(record, context(60.0))
    bad, good = record.entries().values()
    assert (bad["status"], bad["half"], bad["reason"]) == ("failed", 1, "RuntimeError: out of memory")
    assert any("raise RuntimeError" in line for line in bad["traceback"])
    assert (good["status"], good["value"]) == ("done", 2)


def test_a_lost_gpu_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "device_works", lambda device: False)
    record = record_of(tmp_path, running.Measurement("bad", 9, fail), running.Measurement("next", 9, fine))
    assert not running.work(record, context(60.0))
    assert [entry["status"] for entry in record.entries().values()] == ["failed", "not begun"]
    assert not running.work(record, context(60.0)), "the next process begins with the next measurement"
    assert record.entries()["next"]["status"] == "done"


def test_what_has_no_time_left_is_named(tmp_path: Path) -> None:
    given: list[float] = []
    names = {"long": 100.0, "short": 5.0, "middle": 15.0}
    measured = [running.Measurement(n, s, lambda own: given.append(own.clock.seconds)) for n, s in names.items()]
    record = record_of(tmp_path, *measured)
    assert running.work(record, context(10.0))
    entries = record.entries()
    assert entries["long"]["status"] == "skipped" and entries["short"]["status"] == "done"
    assert entries["long"]["reason"] == "10 s were left of the part, and it takes up to 100 s"
    # With more than half of its time left, a measurement runs, and ends in time.
    assert entries["middle"]["status"] == "done" and given == [5.0, pytest.approx(10.0, abs=1.0)]
    assert "| long | skipped | 10 s were left" in gpu_table.gpu_table(entries)


# Workers that need no imports: they take one measurement after the other, each an expression.
WORKER = """
import json, os, sys, time
from pathlib import Path
path, scripts = Path(sys.argv[1]), json.loads(sys.argv[2])
def put(name, **entry):
    result = json.loads(path.read_text())
    result["measurements"][name] = entry
    path.with_suffix(".new").write_text(json.dumps(result))
    path.with_suffix(".new").replace(path)
for name, script in scripts.items():
    if json.loads(path.read_text())["measurements"][name]["status"] == "not begun":
        put(name, status="running", begun=1)
        exec(script)
        put(name, status="done", value=2)
"""


def supervised(folder: Path, scripts: dict[str, str], seconds: float = 60.0, limit: float = 30.0) -> dict[str, dict]:
    """Run measurements that are scripts; returns what is known of each at the end."""
    record = record_of(folder, *(running.Measurement(name, limit, fine) for name in scripts))
    command = [sys.executable, "-S", "-c", WORKER, str(folder / f"{record.name}.json"), json.dumps(scripts)]
    running.supervise(record, timing.Clock(seconds), lambda left: command)
    return record.entries()


def test_a_crash_costs_its_measurement_only(tmp_path: Path) -> None:
    crash = "print('illegal memory access', file=sys.stderr, flush=True); os.abort()"
    lost = f"put(name, status='failed', reason='lost'); os._exit({running.DEVICE_LOST})"
    entries = supervised(tmp_path, {"first": "pass", "bad": crash, "lost": lost, "last": "pass"})
    assert [entry["status"] for entry in entries.values()] == ["done", "failed", "failed", "done"]
    assert entries["bad"]["begun"] == 1 and entries["first"]["value"] == entries["last"]["value"] == 2
    assert entries["bad"]["reason"] == f"its process ended with status {-signal.SIGABRT}\nillegal memory access"
    assert entries["lost"]["reason"] == "lost"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "GRACE_SECONDS", 0.0)
    entries = supervised(tmp_path, {"bad": "time.sleep(60)", "last": "pass"}, limit=1.0)
    assert "stopped after 1 s" in entries["bad"]["reason"] and entries["last"]["status"] == "done"


def test_a_part_stops_in_time_and_names_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "GRACE_SECONDS", 0.0)
    began = time.monotonic()
    entries = supervised(tmp_path, {"first": "pass", "long": "time.sleep(60)", "last": "pass"}, seconds=1.5)
    assert time.monotonic() - began < 20
    assert entries["first"]["status"] == "done"
    assert entries["long"]["status"] == "failed" and "the time of the part was over" in entries["long"]["reason"]
    assert entries["last"] == {"status": "skipped", "reason": "the time of the part was over"}


def test_a_process_that_cannot_start_is_not_tried_for_ever(tmp_path: Path) -> None:
    record = record_of(tmp_path, *(running.Measurement(name, 9, fine) for name in "ab"))
    running.supervise(record, timing.Clock(60.0), lambda left: [sys.executable, "-S", "-c", "raise SystemExit(3)"])
    assert [entry["reason"] for entry in record.entries().values()] == ["its process ended with status 3"] * 2


def test_a_killed_benchmark_leaves_what_it_had(tmp_path: Path) -> None:
    """Killed in the middle of its second measurement, with no chance to tidy up."""
    record = record_of(tmp_path, *(running.Measurement(name, 9, fine) for name in ("first", "second", "third")))
    scripts = {"first": "pass", "second": "print('now', flush=True); time.sleep(60)", "third": "pass"}
    command = [sys.executable, "-S", "-c", WORKER, str(tmp_path / f"{record.name}.json"), json.dumps(scripts)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "now\n"
        process.kill()
    entries = record.entries()
    assert [entry["status"] for entry in entries.values()] == ["done", "running", "not begun"]
    table = gpu_table.gpu_table({**entries, "first": {**entries["first"], "took_seconds": 1.0}})
    assert "| second | cut off |" in table and "| third | not begun |" in table


SOME_TESTS = """
import os, time, pytest
def test_fine(): pass
def test_wrong(): assert 1 == 2
def test_crash(): os.abort()
def test_left_out(): pytest.skip("no such library")
def test_after(): pass
def test_stuck(): time.sleep(60)
def test_slow(): time.sleep(60)
def test_never(): pass
"""


def test_outcomes_of_tests_survive_a_crash_and_the_end_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_POLL_SECONDS", 0.2)

    def keep(result: dict) -> None:
        # Only now, as the start of a process may take long.
        if any("test_stuck" in name for name in result["unfinished"]):
            monkeypatch.setattr(checks, "_STUCK_SECONDS", 0.5)
        if any("test_stuck" in failed["test"] for failed in result["failures"]):
            monkeypatch.setattr(checks, "_STUCK_SECONDS", 60.0)
        saved.append(dict(result))

    path = tmp_path / "test_some.py"
    path.write_text(SOME_TESTS)
    (tmp_path / "test_broken.py").write_text("import no_such_library")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    saved: list[dict] = []
    own = running.Context(CPU, True, timing.Clock(None), keep)
    # The time is up when the slow test has begun.
    own.clock.expired = lambda: bool(saved) and any("test_slow" in name for name in saved[-1]["unfinished"])
    checks.run_tests(own, [str(tmp_path), "-c", str(tmp_path / "pytest.ini")])
    result = own.result
    assert (result["passed"], result["failed"], result["skipped"]) == (2, 4, 1)
    broken, wrong, crash, stuck = result["failures"]
    assert "no_such_library" in broken["message"] and "assert 1 == 2" in wrong["message"]
    assert "ended with status -6" in crash["message"]
    assert stuck["message"].startswith("no end after")
    assert list(result["skips"].values()) == ["Skipped: no such library"]
    assert result["ended"] == "the time was up" and [name[-9:] for name in result["unfinished"]] == ["test_slow"]
    assert [name[-10:] for name in result["not_begun"]] == ["test_never"]
    table = gpu_table.gpu_table({"tests_telling": {**result, "status": "done", "took_seconds": 1.0}})
    assert "| tests_telling | 2 | 4 | 1 | 2 | the time was up |" in table and "test_wrong`: assert 1 == 2" in table


def test_telling_tests_exist() -> None:
    """Each entry of the list names a test function that there is."""
    text = {path.name: path.read_text() for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    entries = [
        line.strip()[2:-2] for line in (ROOT / "tests/gpu/conftest.py").read_text().splitlines() if "\\.py::" in line
    ]
    assert len(entries) > 20
    for entry in entries:
        file, _, name = entry.replace("\\", "").partition("::")
        assert f"def {name.partition('[')[0]}(" in text[file], entry


def test_kernels_of_a_step() -> None:
    a = torch.ones(64, 64)
    times = kernel_times.kernel_times(lambda: a @ a + 1, CPU)
    assert {"aten::mm", "aten::add"} <= {name for name, *_ in times["kernels"]}
    assert 0 < times["device_ms"] <= times["wall_ms"] * 1.5 and times["launches"] >= 2


def test_a_timer_keeps_the_device_busy_until_the_host_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts launches: the device gets through one flush while the host launches two."""
    flushed: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.behind = 0

        def record(self) -> None:
            self.behind = len(flushed)

        def query(self) -> bool:
            return self.behind < 6

        def elapsed_time(self, end: object) -> float:
            return 3.0

    class Buffer:
        def zero_(self) -> None:
            flushed.append(1)

    timer = timing.DeviceTimer(CPU)
    timer.flush = Buffer()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: flushed.clear())
    calls: list[int] = []
    assert timer.seconds(lambda: calls.append(1)) == 0.003
    assert len(calls) == 3, "with two, four and eight flushes"
    timer.seconds(lambda: calls.append(1))
    assert len(calls) == 4


def test_a_slice_stops_when_its_time_is_up(tmp_path: Path) -> None:
    (steps,) = [m for m in measurements.TWO.measurements if m.name == "steps_13b_nf4"]
    own = context(0.0)
    steps.run(own)
    # The first setting is always measured, once.
    assert [entry["layers"] for entry in own.result["steps"]] == [2, 1]
    assert all(len(values) == 1 for entry in own.result["steps"] for values in entry["seconds"].values())


def test_without_bitsandbytes_a_measurement_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    chosen = [m for m in measurements.ONE.measurements if m.name == "whole_7b_nf4_ag"]
    record = record_of(tmp_path, *chosen)
    assert running.work(record, context(60.0))
    entry = record.entries()["whole_7b_nf4_ag"]
    assert entry["status"] == "failed" and "bitsandbytes" in entry["reason"] and entry["variant"] == "SpIEL-AG"


def command_line(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    return parser.parse_args(argv)


def test_the_command_runs_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its workers are told what to measure, where to, and how much time is left."""

    def work_here(record: running.Record, clock: timing.Clock, command) -> None:
        record.begin()
        *start, settings = command(12.5)
        assert start == [sys.executable, "-m", "benchmarks.gpu.worker"]
        part = running.Part("one", 9.0, (running.Measurement("good", 9, fine),))
        monkeypatch.setattr(worker, "PARTS", {"one": part})
        running.Record(tmp_path, part, True).begin()
        assert json.loads(settings)["seconds"] == 12.5
        worker.main(settings)

    monkeypatch.setattr(running, "supervise", work_here)
    before = signal.getsignal(signal.SIGTERM)
    try:
        gpu.run(command_line("one", "--rehearse", "--output", str(tmp_path)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "| good | done in 0 s |" in capsys.readouterr().out


# What a machine with a GPU may lack: everything but torch, transformers, accelerate, PEFT and pytest.
LACKING = ("datasets", "gguf", "hypothesis", "lightning", "matplotlib", "scipy", "trl")


def test_the_command_needs_few_libraries() -> None:
    script = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({LACKING}))
import benchmarks.gpu.worker
sys.argv = ["benchmarks", "gpu", "--help"]
runpy.run_module("benchmarks", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--rehearse" in done.stdout, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_try() -> None:
    with pytest.raises(SystemExit, match="no GPU found; .* --rehearse"):
        gpu.run(command_line("one"))


def test_slices_predict_the_whole_model() -> None:
    setting = {"r": 64, "batch_size": 1, "tokens": 2048, "checkpointing": True}
    steps = [
        {**setting, "layers": layers, "seconds": {"LoRA": [1.0 + 0.5 * layers]}, "failed": {}} for layers in (4, 2)
    ]
    assert gpu_table.predicted_whole({"steps": steps}, "LoRA", 32) == pytest.approx(17.0)
    assert gpu_table.predicted_whole({"steps": steps[:1]}, "LoRA", 32) is None
    assert gpu_table.predicted_whole(None, "LoRA", 32) is None


def test_random_llamas_are_made_on_their_device() -> None:
    model = bases.BaseSpec(shape=bases.TINY, dtype="bfloat16", nf4=True).build()
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors)
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}
    assert kinds == {"Linear4bit"} and type(model.lm_head).__name__ == "Linear"


def test_results_name_their_machine(tmp_path: Path) -> None:
    path = environment.save("x", {"numbers": [1.23456789, 2], "deep": {"a": [[1], []]}}, tmp_path, "cpu")
    stored = environment.load("x", tmp_path)
    assert stored["numbers"] == [1.23457, 2] and stored["deep"] == {"a": [[1], []]}
    assert '"numbers": [1.23457, 2]' in path.read_text()
    assert {"date", "commit", "device", "threads", "python", "versions"} <= set(stored)
    assert environment.load("y", tmp_path) is None
