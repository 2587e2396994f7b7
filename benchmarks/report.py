"""Markdown tables of the results kept in benchmarks/results; the README holds a copy of what this prints."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .environment import RESULTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def quality_table() -> str:
    """Held-out loss by method and learning rate."""
    result = load("quality_smollm2")
    rates = sorted({run["learning_rate"] for run in result["runs"]})
    losses = {(run["method"], run["learning_rate"]): run["held_out_loss"] for run in result["runs"]}
    methods = sorted({method for method, _ in losses})
    lines = [
        "| held-out loss | " + " | ".join(f"lr {rate:.0e}" for rate in rates) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for method in methods:
        cells = [f"{losses[method, rate]:.3f}" if (method, rate) in losses else "" for rate in rates]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def step_table() -> str:
    """Median time of a training step, over LoRA's in the same process."""
    result = load("step_smollm2_r16_4x128")
    medians = result["median_seconds"]
    lines = ["| step, 4 x 128 tokens | seconds | over LoRA |", "|---|---|---|"]
    for name, median in medians.items():
        lines.append(f"| {name} | {median:.2f} | {median / medians['LoRA']:.2f} |")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    print(quality_table(), step_table(), sep="\n\n")
