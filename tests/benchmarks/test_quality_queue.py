"""Plan, queue and report of the quality benchmark."""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks_under_test import ROOT, __main__, cell, environment, quality_plan, quality_report, queue
from scipy import stats

PLAN = quality_plan.load()
TOY = {
    "methods": {
        "lora": {"kind": "lora"},
        "fixed_gradient": {"kind": "sparse", "growth": "none", "start": "gradient"},
        "ag": {"kind": "sparse", "growth": "accumulated_gradient"},
        "base": {},
    },
    "winner": None,
    "tiers": {"toy": {"steps": 6, "cell_seconds": 5}},
    "studies": [
        {"study": "base", "tier": "toy", "task": "toy"},
        {
            "study": "screen",
            "tier": "toy",
            "task": "toy",
            "r": 2,
            "factor": 4,
            "refine": 2,
            "seeds": [0, 1],
            "rates": {"lora": [1e-3, 4e-3, 1.6e-2], "ag": [1e-3, 4e-3], "winner": [1e-3, 4e-3]},
        },
        {
            "study": "ablate",
            "tier": "toy",
            "task": "toy",
            "r": 2,
            "seeds": [0, 1],
            "of": "ag",
            "variants": {"defaults": {}, "decay 3": {"decay": 3.0}},
        },
        {
            "study": "landmarks",
            "tier": "toy",
            "task": "toy",
            "r": 2,
            "seeds": [0],
            "methods": {"fixed_gradient": {"rates_of": "ag", "times": [1, 0.5]}},
        },
        {
            "study": "finals",
            "tier": "toy",
            "task": "toy",
            "r": 2,
            "seeds": [100, 101, 102],
            "rates_from": "toy",
            "methods": ["lora", "ag", "winner"],
        },
    ],
}


@pytest.fixture
def toy_plan(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(TOY))
    return quality_plan.load(path)


def result_of(described: cell.Cell, loss: float, test: float | None = None) -> dict[str, Any]:
    """The result of a finished cell, with the given loss."""
    scores = {"validation": {"loss": loss}, "forgetting": {"english_loss": 3.0 + loss / 10}}
    if test is not None:
        scores["test"] = {"loss": test}
    fields = json.loads(described.to_json())
    measured = {"diverged_at": None, "scores": scores, "curve": [], "density": 0.01, "trained_values": 5}
    return fields | measured | {"seconds": 7.0, "train_seconds": 5.0, "peak_mib": 99.0}


def fill(plan: dict[str, Any], loss_at: Any) -> dict[str, dict[str, Any]]:
    """Results of a whole plan, cell by cell as the queue would; `loss_at` gives a cell's loss."""
    results: dict[str, dict[str, Any]] = {}
    while (following := next(quality_plan.pending(quality_plan.unfold(plan, results), results), None)) is not None:
        loss = loss_at(following)
        results[following.name] = result_of(following, loss, loss + 0.5 if following.study == "finals" else None)
    return results


def stage_of(plan: dict[str, Any], results: dict[str, Any], study: str) -> Any:
    return next(s for s in quality_plan.unfold(plan, results) if s.title.startswith(study))


def rates_of(stage: Any, method: str) -> list[tuple[float, int]]:
    return [(c.rate, c.seed) for c in stage.cells if c.method == method]


# The plan


def test_the_plan_can_be_told_from_nothing() -> None:
    stages = quality_plan.unfold(PLAN, {})
    assert {stage.tier for stage in stages} == {"A", "B", "C"}
    names = [c.name for stage in stages for c in stage.cells]
    assert len(names) == len(set(names)) > 50
    assert all(stage.unknown for stage in stages if stage.title.startswith(("ablate", "finals")))


def test_a_screen_goes_from_coarse_to_fine(toy_plan: dict[str, Any]) -> None:
    best = {"lora": 4e-3, "ag": 3e-4}

    def loss_at(described: cell.Cell) -> float:
        wanted = best.get(described.method, 4e-3)
        return abs(np.log(described.rate / wanted)) + described.seed if described.rate else 9.0

    fresh = stage_of(toy_plan, {}, "screen")
    assert rates_of(fresh, "lora") == [(1e-3, 0), (4e-3, 0), (1.6e-2, 0)]
    assert fresh.unknown == 5 + 5 + (2 + 5) and fresh.chosen == {}
    results = fill(toy_plan, loss_at)
    done = stage_of(toy_plan, results, "screen")
    assert rates_of(done, "lora")[3:] == [(2e-3, 0), (2e-3, 1), (4e-3, 1), (8e-3, 0), (8e-3, 1)]
    # Two extensions below the grid, and the best at the edge of the third would need no more.
    assert [rate for rate, _ in rates_of(done, "ag")][:4] == [1e-3, 4e-3, 2.5e-4, 6.25e-5]
    assert done.chosen == {"lora": 4e-3, "ag": 2.5e-4}
    assert done.unknown == 7 and "winner" in next(iter(done.waits_for))


def test_a_rate_that_diverged_is_not_chosen(toy_plan: dict[str, Any]) -> None:
    results = fill(toy_plan, lambda described: described.rate)
    for result in results.values():
        if result["rate"] == 1e-3:
            result["diverged_at"] = 4
            del result["scores"]
    assert quality_plan.loss_of(next(r for r in results.values() if r["rate"] == 1e-3)) == float("inf")
    assert 1e-3 not in stage_of(toy_plan, results, "screen").chosen.values()


def test_what_follows_takes_the_rates_of_the_screen(toy_plan: dict[str, Any]) -> None:
    assert stage_of(toy_plan, {}, "ablate").waits_for == {"the rate of ag"}
    results = fill(toy_plan, lambda described: abs(described.rate - 4e-3))
    assert {c.rate for c in stage_of(toy_plan, results, "ablate").cells} == {4e-3}
    assert [c.rate for c in stage_of(toy_plan, results, "landmarks").cells] == [4e-3, 2e-3]
    finals = stage_of(toy_plan, results, "finals")
    assert [(c.seed, c.method) for c in finals.cells[:3]] == [(100, "lora"), (100, "ag"), (101, "lora")]
    assert finals.unknown == 3 and finals.waits_for == {"the rate of winner"}


def test_a_winner_gets_a_grid_and_finals_of_its_own(tmp_path: Path) -> None:
    described = copy.deepcopy(TOY) | {"winner": {"like": "ag", "stop_regrowing_at": 0.5}}
    (tmp_path / "plan.json").write_text(json.dumps(described))
    plan = quality_plan.load(tmp_path / "plan.json")
    results = fill(plan, lambda c: abs(c.rate - 4e-3))
    stages = quality_plan.unfold(plan, results)
    assert not any(stage.unknown for stage in stages)
    winners = [c for stage in stages for c in stage.cells if c.method == "winner"]
    assert {c.study for c in winners} == {"screen", "finals"}
    assert all(c.settings["stop_regrowing_at"] == 0.5 and c.settings["kind"] == "sparse" for c in winners)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"study": "screening"}, "study must be one of"),
        ({"task": "fr"}, "tier and task must be one of"),
        ({"rates": {"adapter": [1e-3]}}, r"unknown methods \['adapter'\]"),
    ],
)
def test_a_plan_that_names_what_there_is_not_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    described = copy.deepcopy(TOY)
    described["studies"][1] |= change
    (tmp_path / "plan.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=message):
        quality_plan.load(tmp_path / "plan.json")


# The queue


def working(folder: Path, plan: Path) -> subprocess.Popen[str]:
    program = (
        "import sys; from pathlib import Path; from benchmarks.quality import plan, queue; "
        "sys.exit(queue.work(Path(sys.argv[1]), plan.load(Path(sys.argv[2]))))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder), str(plan)], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )


def measured(folder: Path) -> dict[str, Any]:
    """Results without the entries that differ from run to run."""
    keep = ("scores", "curve", "settings", "rate", "seed", "trained_values", "method", "study", "steps", "diverged_at")
    return {name: {key: r[key] for key in keep} for name, r in queue.read_results(folder).items()}


@pytest.mark.slow
def test_a_killed_queue_goes_on_where_it_was(tmp_path: Path) -> None:
    """Killed twice in the middle of a cell, it loses that cell only; another queue is kept out meanwhile."""
    described = copy.deepcopy(TOY)
    described["studies"] = described["studies"][:1] + [
        described["studies"][1] | {"rates": {"lora": [0.016, 0.064, 0.256]}, "seeds": [0]}
    ]
    del described["studies"][1]["refine"]
    path, folder = tmp_path / "plan.json", tmp_path / "killed"
    path.write_text(json.dumps(described))
    plan = quality_plan.load(path)
    for kill in (signal.SIGKILL, signal.SIGTERM):
        process = working(folder, path)
        assert process.stdout is not None
        # The second line names the second cell: the first one is through.
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert all(lines)
        if kill == signal.SIGKILL:
            with pytest.raises(RuntimeError, match="another queue works on"):
                queue.work(folder, plan)
        process.send_signal(kill)
        process.wait()
    _wait_for_orphans()
    before = queue.read_results(folder)
    assert before
    assert queue.work(folder, plan) == 0
    results = measured(folder)
    stages = quality_plan.unfold(plan, results)
    assert not list(quality_plan.pending(stages, results))
    for described in (c for stage in stages for c in stage.cells):
        path = tmp_path / "uninterrupted" / described.name
        environment.save(path.name, cell.run(described), path.parent, "cpu")
    assert results == measured(tmp_path / "uninterrupted")
    assert not list(folder.rglob("*.part"))
    # What was through was not run again.
    after = queue.read_results(folder)
    assert all(after[name]["date"] == before[name]["date"] for name in before)


def _wait_for_orphans() -> None:
    """Wait until no cell of a killed queue writes results any more."""
    for _ in range(200):
        commands = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if os.access(p, os.R_OK)]
        if not any(b"benchmarks.quality.cell" in command and b'"toy"' in command for command in commands):
            return
        time.sleep(0.1)


def test_a_failing_cell_is_told_and_left_for_the_next_run(
    tmp_path: Path, toy_plan: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    toy_plan["studies"] = toy_plan["studies"][1:2]
    toy_plan["studies"][0] |= {"rates": {"ag": [1e-3]}, "seeds": [0]}
    del toy_plan["studies"][0]["refine"]
    toy_plan["methods"]["ag"] = {"kind": "sparse", "growth": "none", "start": "lottery"}  # lacks its rate
    assert queue.work(tmp_path / "cells", toy_plan) == 1
    assert "KeyError: 'lottery_rate'" in capsys.readouterr().err
    assert queue.read_results(tmp_path / "cells") == {}


def test_a_queue_starts_nothing_that_would_not_be_through(tmp_path: Path, toy_plan: dict[str, Any]) -> None:
    assert queue.work(tmp_path / "cells", toy_plan, hours=4 / 3600) == 0
    assert queue.read_results(tmp_path / "cells") == {}


def test_a_tier_of_its_own(toy_plan: dict[str, Any]) -> None:
    stages = quality_plan.unfold(toy_plan, {})
    assert list(quality_plan.pending(stages, {}, "toy")) == list(quality_plan.pending(stages, {}))
    assert list(quality_plan.pending(stages, {}, "A")) == []


def test_status_counts_cells_and_hours(toy_plan: dict[str, Any]) -> None:
    text = queue.status(toy_plan, {})
    lines = text.splitlines()
    assert lines[1].split() == ["base,", "tier", "toy,", "toy", "0", "1", "0.00"]
    # 5 coarse cells, 5 more of each of two methods, 7 of the winner; 5 guessed seconds each.
    assert lines[2].startswith("screen, tier toy, toy, r=2") and lines[2].split()[5:8] == ["0", "22", "0.03"]
    assert lines[-1].split() == ["all", "0", str(1 + 22 + 4 + 2 + 9), "0.05"]
    results = fill(toy_plan, lambda described: described.rate)
    # Once cells are through, their median counts instead of the guess.
    assert queue.cell_seconds(toy_plan, results) == {"toy": 7.0}
    toy_plan["studies"] = toy_plan["studies"][:1]
    assert f"results that the plan does not name (it has changed since): {len(results) - 1}" in queue.status(
        toy_plan, results
    )


def test_the_command_says_what_is_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "quality", "status", "--output", "/nonexistent"])
    __main__.main()
    printed = capsys.readouterr().out
    assert "screen, tier A, es, r=4" in printed and "the winner of the ablation" in printed


# The report


def noisy(described: cell.Cell) -> float:
    """A loss with its own noise per cell, lower for ag than for lora."""
    rng = np.random.default_rng([described.seed, len(described.method)])
    offset = {"lora": 0.2, "ag": 0.1}.get(described.method, 0.0)
    return 2.0 + offset + 0.01 * rng.standard_normal() + (abs(np.log(described.rate / 4e-3)) if described.rate else 1)


def test_the_report_shows_every_study(toy_plan: dict[str, Any], tmp_path: Path) -> None:
    results = fill(toy_plan, noisy)
    page, *plots = quality_report.write(toy_plan, results, tmp_path / "QUALITY.md", tmp_path / "plots")
    text = page.read_text()
    assert [path.name for path in plots] == ["quality_toy_toy_r2.png"] and plots[0].stat().st_size > 5000
    for title in ("## Base, tier toy", "## Screen", "## Ablate", "## Landmarks", "## Finals", "## Not run"):
        assert title in text
    assert "| lora |" in text and "**0.004: " in text
    assert "| screen, tier toy, toy, r=2 | 7 |" in text
    # Nothing measured, nothing claimed.
    empty = quality_report.write(toy_plan, {}, tmp_path / "QUALITY.md", tmp_path / "plots")
    assert len(empty) == 1 and "## Screen" not in empty[0].read_text()


def test_finals_are_compared_in_pairs(toy_plan: dict[str, Any]) -> None:
    results = fill(toy_plan, noisy)
    stage = stage_of(toy_plan, results, "finals")
    pairs = np.array(quality_report.paired_losses(stage, results, "ag", "lora"))
    assert pairs.shape == (3, 2)
    difference, low, high = quality_report.paired_interval([a - b for a, b in pairs])
    reference = stats.ttest_rel(pairs[:, 0], pairs[:, 1])
    interval = reference.confidence_interval(0.95)
    assert (difference, low, high) == pytest.approx(((pairs[:, 0] - pairs[:, 1]).mean(), interval.low, interval.high))
    table = quality_report.comparison_table(stage, results)
    assert f"| ag minus lora | 3 | {difference:+.4f} | {low:+.4f} to {high:+.4f} | ag |" in table
    assert "winner" not in table
    # Forgetting is after minus before, and before is the bare base's.
    before = next(r for r in results.values() if r["method"] == "base")["scores"]["forgetting"]["english_loss"]
    after = [r["scores"]["forgetting"]["english_loss"] for r in results.values() if r["study"] == "finals"]
    of_ag = [
        r["scores"]["forgetting"]["english_loss"]
        for r in results.values()
        if r["study"] == "finals" and r["method"] == "ag"
    ]
    assert len(after) == 6
    assert f"{np.mean(of_ag) - before:+.4f}" in quality_report.finals_table(stage, results)


def test_undecided_comparisons_say_so(toy_plan: dict[str, Any]) -> None:
    def tied(described: cell.Cell) -> float:
        return 2.0 + described.rate + (0.1 if (described.method == "ag") == bool(described.seed % 2) else 0.0)

    results = fill(toy_plan, tied)
    table = quality_report.comparison_table(stage_of(toy_plan, results, "finals"), results)
    assert "neither, by this many seeds" in table


def test_ablations_are_paired_by_seed(toy_plan: dict[str, Any]) -> None:
    results = fill(toy_plan, lambda c: 2.0 + c.seed + (0.25 if c.method == "decay 3" else 0.0))
    table = quality_report.ablation_table(stage_of(toy_plan, results, "ablate"), results)
    assert "| decay 3 | 2.7500 | +0.2500 | +0.2500, +0.2500 |" in table


def test_the_committed_page_is_what_the_results_say(tmp_path: Path) -> None:
    page, *_ = quality_report.write(PLAN, queue.read_results(queue.FOLDER), tmp_path / "page.md", tmp_path)
    assert page.read_text() == quality_report.PAGE.read_text()


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    from benchmarks_under_test import quality

    quality.add_arguments(parser)
    assert parser.parse_args(["run", "--tier", "B", "--hours", "1.5"]).hours == 1.5
    with pytest.raises(SystemExit):
        parser.parse_args(["run", "--tier", "D"])
