"""Times of whole training steps of several variants, interleaved in one process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .timing import Clock, interleave, median, quantile
from .variants import Budget, TrainingRun, build

Failures = dict[str, str]
LORA, LOWER_BOUND = "LoRA", "lower bound"


def set_up(
    make_base: Callable[[], Any], names: Iterable[str], budget: Budget, failures: Failures
) -> dict[str, TrainingRun]:
    """Every variant on a base of its own; one that cannot be set up is noted in `failures` instead."""
    runs = {}
    for name in names:
        try:
            runs[name] = build(name, make_base(), budget)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"[:500]
    return runs


def warm_up(runs: dict[str, TrainingRun], batches: list[Tensor], failures: Failures, steps: int | None = None) -> None:
    """Bring every run into its steady state; one that fails is noted and dropped."""
    for name, run in list(runs.items()):
        try:
            for number in range(steps or run.warmup_steps):
                run.step(batches[number % len(batches)])
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"[:500]
            del runs[name], run
            _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step_seconds(
    runs: Mapping[str, TrainingRun], batches: list[Tensor], repetitions: int, clock: Clock | None = None
) -> dict[str, list[float]]:
    """Seconds of every repetition of a step, by variant; all variants see the same batches in the same order."""
    device = batches[0].device
    counts = dict.fromkeys(runs, 0)

    def action(name: str) -> Callable[[], None]:
        def step() -> None:
            runs[name].step(batches[counts[name] % len(batches)])
            counts[name] += 1

        return step

    return interleave({name: action(name) for name in runs}, repetitions, device, clock)


def print_times(
    title: str,
    seconds: Mapping[str, list[float]],
    failures: Failures,
    references: Sequence[str] = (LORA, LOWER_BOUND),
) -> None:
    """Medians, 20% and 80% quantiles, and medians over those of the references."""
    print(f"{title:28}   median      20%      80% s" + "".join(f"{'/ ' + name:>16}" for name in references))
    medians = {name: median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        ratios = [f"{medians[name] / medians[r]:16.2f}" if r in medians else " " * 16 for r in references]
        low, high = quantile(values, 0.2), quantile(values, 0.8)
        print(f"{name:28} {medians[name]:8.4g} {low:8.4g} {high:8.4g}  {''.join(ratios)}", flush=True)
    for name, reason in failures.items():
        print(f"{name:28} failed: {reason}", flush=True)
