"""The page of results agrees with the JSON files: tables, targets, plots."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from benchmarks_under_test import ROOT, environment, page, plots, report, tables

MACHINE = {"batch_size": 4, "tokens": 128, "dtype": "float32"}


def alone_rounds() -> list[dict[str, Any]]:
    """Three rounds, the first one slow: LoRA's steps take 1 s, SpIEL-AG's 1.1 s, and 2.1 s in its window."""
    rounds = []
    for factor in (3.0, 1.0, 1.0):
        lora = {"seconds": [factor] * 25, "peak_mib": 1000.0}
        spiel = {"seconds": [2.1 * factor] * 5 + [1.1 * factor] * 15 + [2.1 * factor] * 5, "peak_mib": 990.0}
        rounds.append({"LoRA": lora, "SpIEL-AG": spiel, "SpIEL-MA, SM3": {"error": "exit status 1: a | b"}})
    return rounds


def write_cpu_results(folder: Path, spiel_seconds: float = 0.9) -> tables.Results:
    """Made-up results of every CPU benchmark."""
    seconds = {"lower bound": [0.8], "LoRA": [1.0, 1.1, 0.9], "LoRA, dropout 0.05": [1.3], "SpIEL-AG": [spiel_seconds]}
    loaded = {"loaded_mib": 500.0}
    peak = {
        "LoRA": {**loaded, "peak_mib": 1000.0, "steady_mib": 900.0},
        "SpIEL-AG": {**loaded, "peak_mib": 800.0, "steady_mib": 720.0},
        "full fine-tuning": {"error": "killed"},
    }
    for r in (4, 16):
        settings = {**MACHINE, "r": r}
        failed = {"dense formula": "OutOfMemoryError: none left"}
        environment.save(
            f"step_smollm2_r{r}_4x128", {"settings": settings, "seconds": seconds, "failed": failed}, folder
        )
        environment.save(f"memory_smollm2_r{r}_4x128", {"settings": settings, "memory": peak}, folder)
    alone = {"settings": {**MACHINE, "r": 16}, "rounds": alone_rounds()}
    environment.save("alone_smollm2_r16_4x128", alone, folder)
    growth = {"seconds": [1.0] * 25, "share": 0.03, "share_of_moving_steps": 0.02}
    shares = {"settings": {**MACHINE, "r": 16}, "growth": {"accumulated_gradient": growth, "momentum": growth}}
    environment.save("share_smollm2_r16_4x128", shares, folder)
    sizes = {"rows": 4096, "cols": 4096, "density": 0.01, "tokens": 2048}
    layer_seconds = {"frozen linear": [1.0], "SpIEL, profile indices": [1.1]}
    environment.save("layer_4096x4096", {"settings": sizes, "seconds": layer_seconds, "failed": {}}, folder)
    environment.save("ops_cpu", {"floors": FLOORS, "results": [*operations("float32")]}, folder)
    points = [
        {"grows": grows, "density": 0.01, "width": 512, "tokens": 512, "seconds": {"LoRA": [0.2], "lower bound": [0.1]}}
        for grows in ("density", "width", "tokens")
    ]
    environment.save("scaling_cpu", {"results": points}, folder)
    return tables.Results(folder)


FLOORS = {"bytes_per_second": 1e10, "flops_per_second": {"float32": 1e11}}


def operations(dtype: str) -> list[dict[str, Any]]:
    common = {"tokens": 512, "dtype": dtype, "indices": "profile", "floor_seconds": 0.01}
    gathers = [
        {**common, "op": op, "rows": n, "cols": n, "density": d, "k": int(d * n * n)}
        | {"seconds": [0.1 * d * n], "dense_seconds": [0.1]}
        for op in ("gather", "gather sampled")
        for n in (64, 128)
        for d in (0.01, 0.1)
    ]
    fold = {**common, "op": "fold nf4", "rows": 4096, "cols": 4096, "density": 0.03, "k": 10}
    return [
        *gathers,
        {**fold, "seconds": [0.012], "dense_seconds": [0.04]},
        {**fold, "op": "select", "failed": "NameError: not yet"},
    ]


def write_gpu_results(folder: Path) -> None:
    """Made-up results of both parts of the GPU benchmark; the second was cut off."""
    setting = {"r": 64, "batch_size": 1, "tokens": 2048, "checkpointing": True}
    step = {"seconds": {"LoRA": [1.0], "SpIEL-AG, profile indices": [0.97]}, "failed": {"dense formula": "too large"}}
    done = {"status": "done", "took_seconds": 1.0}
    whole = {"model": "7b_nf4", "base": {"shape": {"layers": 32}}, "status": "done", "took_seconds": 9.0}
    weighed = {"peak_mib": 1000.0, "peak_between_windows_mib": 900.0, "seconds": [1.0], "first_seconds": [1.5, 1.25]}
    profile = {"launches": 3, "device_ms": 4.0, "wall_ms": 5.0, "kernels": [["_fold_4bit_kernel", 3, 4.0]]}
    failed = {**whole, "status": "failed", "reason": "a | b"}
    case = {"rows": 4096, "cols": 4096, "density": 0.03, "indices": "profile"}
    folds = {"seconds": {"in place": [2e-5], "copy": [3e-5], "no deltas": [1e-5]}, "product": True, "sound": True}
    crashed = {"test": "tests/gpu/test_x.py::test_a", "message": "E   a | b\nmore"}
    tests = {
        "passed": 5,
        "failed": 1,
        "skipped": 0,
        "failures": [crashed],
        "unfinished": [],
        "not_begun": ["b"],
        "ended": "all have run",
    }
    one = {
        "tests_telling": {**done, **tests},
        "fold_nf4": {**done, "results": operations("bfloat16")},
        "in_place": {**done, "in_place": [{**case, **folds}]},
        "compile": {**done, "compiled": {"nf4": {"kernels": 12, "seconds": 8.0}}},
        "whole_7b_nf4_qlora": {**whole, "variant": "LoRA", **weighed, "profile": profile},
        "whole_7b_nf4_ma": {**whole, "variant": "SpIEL-MA, SM3", **weighed, "peak_mib": 940.0},
        "whole_7b_nf4_ag": {**failed, "variant": "SpIEL-AG"},
    }
    two = {
        "steps_7b_nf4": {**done, "steps": [{**setting, "layers": 4, **step}]},
        "gather": {"status": "running", "results": operations("bfloat16")},
        "growth": {"status": "skipped", "reason": "the time of the part was over"},
        "share": {"status": "not begun"},
    }
    environment.save("gpu_one", {"part": "one", "measurements": one}, folder)
    environment.save("gpu_two", {"part": "two", "measurements": two}, folder)


def verdicts(results: tables.Results) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in (page.judge(target, results) for target in page.TARGETS)}


def test_the_page_is_what_the_results_say() -> None:
    assert report.PAGE.read_text(encoding="utf-8") == page.results_page(tables.Results())


def test_targets_are_judged_by_the_medians(tmp_path: Path) -> None:
    found = verdicts(write_cpu_results(tmp_path))
    step = "CPU, SmolLM2-135M, fp32, 4x128, many models in one process: step, SpIEL"
    assert found[f"{step} / LoRA, r=4"] == ["<= 0.95", "0.90", "met"]
    assert found[f"{step} / LoRA with dropout 0.05, r=16"] == ["<= 0.82", "0.69", "met"]
    assert found[f"{step} / lower bound, r=4"] == ["<= 1.12", "1.12", "missed"]
    assert found["the same, peak memory, SpIEL-AG / LoRA, r=4"] == ["<= 0.82", "0.80", "met"]
    assert found["the same, peak memory, SpIEL-MA / LoRA, r=16"] == ["<= 0.82", "", "not measured"]
    assert found["share of a run spent moving deltas, SpIEL-AG (CPU), r=16"] == ["<= 4.0%", "3.0%", "met"]
    assert [row[2] for label, row in found.items() if label.startswith("GPU")] == ["not measured"] * 11


def test_gpu_targets_are_judged(tmp_path: Path) -> None:
    write_gpu_results(tmp_path)
    found = verdicts(tables.Results(tmp_path))
    nf4 = "GPU, 7B NF4, r=64, checkpointing, 1x2048"
    assert found[f"{nf4}: step, SpIEL-AG / QLoRA, slice, profile indices"] == ["<= 1.00", "0.97", "met"]
    assert found[f"{nf4}: peak memory, SpIEL-MA + SM3 / QLoRA"] == ["<= 0.95", "0.94", "met"]
    assert found[f"{nf4}: peak memory, SpIEL-AG + AdamW / QLoRA"][2] == "not measured"
    fold = "GPU: NF4 dequantize + scatter-add over its byte floor, 4096x4096"
    assert found[fold] == ["<= 1.30", "1.20", "met"]


def test_page_and_plots_of_every_benchmark(tmp_path: Path) -> None:
    write_gpu_results(tmp_path)
    results = write_cpu_results(tmp_path)
    text = page.results_page(results)
    for title in ("Targets", "Steps on a CPU: r=4, 4x128", "Peak memory on a CPU", "Operations on a CPU", "GPU"):
        assert f"## {title}\n" in text
    assert "| dense formula | failed | OutOfMemoryError: none left |" in text
    assert "| whole_7b_nf4_ag | failed | a / b |" in text and "| gather | cut off |" in text
    assert "| growth | skipped | the time of the part was over |" in text and "| share | not begun |" in text
    assert "| tests_telling | 5 | 1 | 0 | 1 | all have run |" in text
    assert "- `tests/gpu/test_x.py::test_a`: a | b" in text
    # 10 us for each of 4 matrices in 32 layers, three times a step.
    assert "| 4096x4096 | 3.00% | profile | yes | 20.0 | 30.0 | 10.0 | 0.67 | 3.8 |  |" in text
    assert "| 7b_nf4 | SpIEL-MA, SM3 | 940 | 0.94 | 900 | 1000 | 1.00 |  | 1500, 1250 |" in text
    assert "Kernels compiled: 12 for nf4 in 8.0 s." in text
    assert "whole_7b_nf4_qlora: 3 launches, 4.0 ms in kernels, 5.0 ms with the profiler:" in text
    assert "| `_fold_4bit_kernel` | 3 | 4.00 |" in text
    assert "| SpIEL-AG | 500 | 800 | 0.80 | 720 | 0.80 |" in text
    assert "| full fine-tuning | failed | killed |" in text
    assert "| select | 4096x4096 | 3.00% | 512 | float32 | profile | failed | NameError: not yet |" in text
    widths = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    headers = [line.count("|") for line in text.splitlines() if line.startswith("|---")]
    assert set(widths) == set(headers)
    drawn = plots.draw_all(results, tmp_path / "plots")
    assert {path.stem for path in drawn} == set(plots.PLOTS)
    assert all(0 < path.stat().st_size < 100_000 and f"plots/{path.name})" in text for path in drawn)


def test_what_users_see_is_compared_round_by_round(tmp_path: Path) -> None:
    results = write_cpu_results(tmp_path)
    table = tables.alone_table(results)
    assert "| r=16, 4x128 | LoRA | 1.00 s (1.00) | 1.00 s (1.00) | +0.0 s | 1000 MiB (1.00) |" in table
    assert "| r=16, 4x128 | SpIEL-AG | 1.10 s (1.10) | 1.35 s (1.35) | +5.0 s | 990 MiB (0.99) |" in table
    text = page.results_page(results)
    assert table in text and "## As users run it, on a CPU" in text
    assert "| SpIEL-AG | 3.3, 1.1, 1.1 | 4.05, 1.35, 1.35 | 990, 990, 990 |" in text
    assert "| SpIEL-MA, SM3 | failed | exit status 1: a / b |  |" in text
    found = verdicts(results)
    as_users = "CPU, SmolLM2-135M, fp32, 4x128, as users run it: step, SpIEL / LoRA"
    assert found[f"{as_users}, whole cycle, r=16"] == ["<= 1.00", "1.35", "missed"]


def test_an_empty_folder_gives_a_page_of_targets(tmp_path: Path) -> None:
    text = page.results_page(tables.Results(tmp_path))
    assert text.count("not measured") == len(page.TARGETS) and "## GPU" not in text
    assert plots.drawable(tables.Results(tmp_path)) == {}


def test_tables_of_a_text_are_renewed(tmp_path: Path) -> None:
    results = write_cpu_results(tmp_path)
    text = "before\n<!-- benchmarks: alone -->\nold\n<!-- end -->\nafter\n"
    renewed = report.with_tables(text, results)
    assert f"<!-- benchmarks: alone -->\n\n{tables.alone_table(results)}\n\n<!-- end -->\nafter" in renewed
    assert "old" not in renewed
    assert report.with_tables(renewed, results) == renewed
    # Without results, there is no table.
    empty = tables.Results(tmp_path / "empty")
    assert report.with_tables(renewed, empty) == text.replace("old\n", "")
    with pytest.raises(ValueError, match="no table is called 'speed'; there are alone"):
        report.with_tables("<!-- benchmarks: speed -->\n<!-- end -->", results)


def test_report_command(tmp_path: Path) -> None:
    write_cpu_results(tmp_path)
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmarks: alone -->\n<!-- end -->\n")
    argv = ["--output", str(tmp_path), "--page", str(tmp_path / "page.md"), "--readme", str(readme)]
    report.run(parser.parse_args(argv))
    assert "| SpIEL-AG | 1.10 s (1.10) | 1.35 s (1.35) | +5.0 s | 990 MiB (0.99) |" in readme.read_text()
    assert (tmp_path / "page.md").read_text() == page.results_page(tables.Results(tmp_path))
    assert (tmp_path / "plots" / "steps.png").is_file()


def test_links_of_the_page_exist() -> None:
    text = report.PAGE.read_text(encoding="utf-8")
    for name in plots.drawable(tables.Results()):
        assert f"(results/plots/{name}.png)" in text
        assert (ROOT / "benchmarks" / "results" / "plots" / f"{name}.png").is_file()


def test_compiled_kernels(tmp_path: Path) -> None:
    columns = ["registers", "stack_bytes", "shared_bytes", "matrix", "barriers", "instructions"]
    tile = {"kernel": "tile", "warps": 4, "sm_80": [122, 0, 32768, 32, 8, 400], "sm_90": [66, 0, 49152, 4, 4, 500]}
    plain = {"kernel": "tile", "warps": 4, "sm_80": [206, 8, 16384, 0, 6, 2500]}
    result = {
        "parts": [80, 90],
        "columns": columns,
        "kernels": [tile, {**tile, "sm_80": [140, 0, 1024, 32, 8, 300]}, plain],
    }
    environment.save("compiled_kernels", {**result, "faults": ["tile (a fp32): 8 bytes"]}, tmp_path)
    text = page.results_page(tables.Results(tmp_path))
    assert "| `tile` | 4 |  | 1 | 206, 8, 16, 2500 |  |\n" in text
    assert "| `tile` | 4 | yes | 2 | 140, 0, 32, 400 | 66, 0, 48, 500 |\n" in text
    assert "Faults:\n\n- tile (a fp32): 8 bytes\n" in text
    environment.save("compiled_kernels", {**result, "faults": []}, tmp_path)
    assert "No fault: nothing spills" in page.results_page(tables.Results(tmp_path))
