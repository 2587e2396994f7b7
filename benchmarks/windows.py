"""The share of a run that goes into moving deltas: gathering candidates, selecting them, pruning and regrowing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .timing import Clock, median, wall_seconds
from .variants import FIRST_CLOSE, TrainingRun

REGROW_EVERY = 20  # the default of SpIELConfig, like FIRST_CLOSE


def moving_steps(growth: str | None, steps: int) -> list[int]:
    """Steps, counted from 1, that do more than train: windows and closes; none where nothing grows."""
    if growth is None:
        return []
    length = FIRST_CLOSE if growth == "accumulated_gradient" else 1
    closes = range(FIRST_CLOSE, steps + 1, REGROW_EVERY)
    return sorted({step for close in closes for step in range(max(1, close - length + 1), close + 1)})


def shares(seconds: list[float], growth: str | None) -> dict[str, float]:
    """Shares of whole cycles after the first close.

    Args:
        seconds: of the steps of a run from the first one, up to and including a close.

    Returns:
        ``share``: total time beyond as many median steps as there were, over the total; ``share_of_moving_steps``:
        the same with only the steps of windows and closes counted as dearer than the median.
    """
    moving = set(moving_steps(growth, len(seconds)))
    cycles = {step: value for step, value in enumerate(seconds, start=1) if step > FIRST_CLOSE}
    plain = median([value for step, value in cycles.items() if step not in moving])
    total = sum(cycles.values())
    extra = sum(value - plain for step, value in cycles.items() if step in moving)
    return {
        "share": (total - len(cycles) * plain) / total,
        "share_of_moving_steps": extra / (len(cycles) * plain + extra),
    }


def measure(
    run: TrainingRun, growth: str | None, batches: list[Tensor], cycles: int, clock: Clock | None = None
) -> dict[str, Any]:
    """Time a run with the default cycle step by step, from its first step over so many cycles after the first close."""
    seconds: list[float] = []
    for number in range(FIRST_CLOSE + cycles * REGROW_EVERY):
        ids = batches[number % len(batches)]
        seconds.append(wall_seconds(lambda ids=ids: run.step(ids), ids.device))
        since_close = len(seconds) - FIRST_CLOSE
        if since_close > 0 and since_close % REGROW_EVERY == 0 and clock is not None and clock.expired():
            break
    return {"seconds": seconds, "moving_steps": moving_steps(growth, len(seconds)), **shares(seconds, growth)}
