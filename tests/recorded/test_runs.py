"""Whole runs, on one rank and on two, whose results must not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.ranks import launch, results_of

from .models import RUNS, run

# Relative, for machines with another arithmetic: how far losses may be from the recorded ones.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.05}


def assert_as_recorded(name: str, ranks: list[dict[str, Any]], recorded: list[dict[str, Any]], exact: bool) -> None:
    assert len(ranks) == len(recorded)
    for rank, expected in zip(ranks, recorded, strict=True):
        tolerance = next(value for dtype, value in TOLERANCE.items() if dtype in name)
        assert rank["losses"] == pytest.approx(expected["losses"], rel=tolerance)
        if exact:
            steps = zip(rank["losses"], expected["losses"], strict=True)
            different = [step for step, (loss, before) in enumerate(steps, start=1) if loss != before]
            assert not different, f"losses differ from step {different[0]} on"
            assert rank["digest"] == expected["digest"], "the losses agree, the last bits of the adapter do not"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_what_it_gave(name: str, recorded_runs: dict[str, Any], same_arithmetic: bool) -> None:
    assert_as_recorded(name, [run(name)], recorded_runs["runs"][name], same_arithmetic)


def test_runs_on_two_ranks_give_what_they_gave(
    tmp_path: Path, recorded_runs: dict[str, Any], same_arithmetic: bool
) -> None:
    launched = launch(str(Path(__file__).with_name("ranks_scenarios.py")), tmp_path, ranks=2)
    for name in RUNS:
        full_name = f"{name}-two-ranks"
        assert_as_recorded(full_name, results_of(launched, name), recorded_runs["runs"][full_name], same_arithmetic)
