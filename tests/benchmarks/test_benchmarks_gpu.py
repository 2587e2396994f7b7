"""The parts of the GPU benchmark, at tiny sizes on the CPU; a part that fails does not stop the others."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from benchmarks_under_test import bases, environment, gpu, gpu_table, parts, timing

FINE = 'from pathlib import Path; import sys; Path(sys.argv[1]).write_text(\'{"status": "done"}\')'


def tiny_place(folder: Path) -> parts.Place:
    return parts.Place(folder, "gpu_tiny", "cpu", True)


def part_named(name: str) -> parts.Part:
    return next(part for part in gpu.PARTS if part.name == name)


@pytest.mark.parametrize("name", [part.name for part in gpu.PARTS])
def test_every_part_runs(name: str, tmp_path: Path) -> None:
    place = tiny_place(tmp_path)
    result = parts.run_part(part_named(name), place, timing.Clock(60.0))
    assert result["status"] == "done", result
    assert "failed" not in str(result.get("variants", "")) and not any(
        entry["failed"] for entry in result.get("steps", []) if "full fine-tuning" not in entry["failed"]
    )
    assert all("failed" not in entry for entry in result.get("results", []))
    stored = place.result(name)
    assert stored["status"] == "done" and stored["tiny"] and stored["date"] and place.is_done(name)
    table = gpu_table.gpu_table({name: stored})
    assert f"| {name} | done in" in table


def test_a_slice_stops_when_its_time_is_up(tmp_path: Path) -> None:
    place = tiny_place(tmp_path)
    result = parts.run_part(part_named("steps_13b_nf4"), place, timing.Clock(0.0))
    # The first setting is always measured, once.
    assert result["status"] == "done" and [entry["layers"] for entry in result["steps"]] == [2, 1]
    assert all(len(values) == 1 for entry in result["steps"] for values in entry["seconds"].values())


def test_without_bitsandbytes_a_part_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = parts.run_part(part_named("whole_7b_nf4"), tiny_place(tmp_path), timing.Clock(60.0))
    assert result["status"] == "failed" and "bitsandbytes" in result["reason"]
    measured = parts.run_part(part_named("dequantize"), tiny_place(tmp_path), timing.Clock(0.01))
    assert measured["status"] == "done"


def test_a_part_that_fails_keeps_what_it_had(tmp_path: Path) -> None:
    def fail(context: parts.Context) -> None:
        context.keep(half=1)
        raise RuntimeError("an illegal memory access was encountered")

    place = tiny_place(tmp_path)
    ran: list[str] = []
    fine = parts.Part("fine", 1, lambda context: ran.append("fine"))
    parts.run_parts([parts.Part("bad", 1, fail), fine], place, timing.Clock(60.0))
    bad = place.result("bad")
    assert bad["half"] == 1 and bad["status"] == "failed" and "illegal memory access" in bad["reason"]
    assert any("fail(" in line or "raise RuntimeError" in line for line in bad["traceback"])
    assert ran == ["fine"] and place.is_done("fine") and not place.is_done("bad")


def test_parts_share_the_time_by_weight(tmp_path: Path) -> None:
    given: list[float] = []
    weights = {"first": 3.0, "second": 1.0}
    many = [parts.Part(n, w, lambda context: given.append(context.clock.seconds)) for n, w in weights.items()]
    parts.run_parts(many, tiny_place(tmp_path), timing.Clock(100.0))
    assert given == [pytest.approx(75, abs=1), pytest.approx(100, abs=1)]
    parts.run_parts(many, tiny_place(tmp_path), timing.Clock(0.0))
    assert len(given) == 2


def supervised(tmp_path: Path, scripts: dict[str, str]) -> parts.Place:
    """Run parts whose processes are scripts; each process runs one part and is given the path of its result."""
    place = tiny_place(tmp_path)

    def command(pending: list[parts.Part], seconds: float) -> list[str]:
        path = tmp_path / f"{place.file_name(pending[0].name)}.json"
        return [sys.executable, "-c", f"import time; time.sleep(0.05); {scripts[pending[0].name]}", str(path)]

    many = [parts.Part(name, 1, lambda context: None) for name in scripts]
    parts.supervise(many, place, timing.Clock(30.0), command)
    return place


def test_a_process_that_dies_costs_its_part_only(tmp_path: Path) -> None:
    place = supervised(tmp_path, {"bad": "import os; os._exit(3)", "fine": f"{FINE}; sys.exit(0)"})
    assert place.result("bad")["reason"] == "its process ended with status 3"
    assert place.is_done("fine")


def test_a_process_that_hangs_costs_its_part_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "GRACE_SECONDS", -29.0)
    began = time.monotonic()
    place = supervised(tmp_path, {"bad": "time.sleep(60)", "fine": FINE})
    assert "no end after" in place.result("bad")["reason"] and time.monotonic() - began < 25
    assert place.is_done("fine")


def command_line(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    return parser.parse_args(argv)


def test_parts_with_results_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def recorder(name: str) -> Callable[[parts.Context], None]:
        return lambda context: ran.append(name)

    monkeypatch.setattr(gpu, "PARTS", tuple(parts.Part(name, 1, recorder(name)) for name in ("a", "b")))
    tiny_place(tmp_path).save("a", {"status": "done"})
    tiny_place(tmp_path).save("b", {"status": "failed", "reason": "once"})
    argv = ["--device", "cpu", "--tiny", "--in-process", "--output", str(tmp_path)]
    gpu.run(command_line(*argv))
    assert ran == ["b"] and "a: skipped" in capsys.readouterr().out
    gpu.run(command_line(*argv, "--force"))
    assert ran == ["b", "a", "b"]


def test_the_worker_gets_what_is_left() -> None:
    args = command_line("--device", "cpu", "--tiny", "--output", "results")
    command = gpu._command(args, gpu.PARTS[:2], 12.34)
    assert command[1:4] == ["-m", "benchmarks", "gpu"] and command[-3:] == ["--parts", "machine", "dequantize"]
    again = command_line(*command[4:])
    assert again.in_process and again.tiny and again.budget_seconds == 12.3 and again.output.is_absolute()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_try() -> None:
    with pytest.raises(SystemExit, match="no GPU found; .* --device cpu --tiny"):
        gpu.run(command_line())


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
