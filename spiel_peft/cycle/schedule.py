"""When a cycle closes and what share of the deltas it replaces. Pure functions of step counts.

Steps are optimizer steps of one run, counted from 1. With S = regrow_every and g = accumulation_steps the closes are
at g, S + g, 2 S + g, ... (Ansell et al., 2024, section 3.2, counted in optimizer steps instead of micro-batches).
"""

from __future__ import annotations

import math


def closes_at(step: int, regrow_every: int, accumulation_steps: int) -> bool:
    """Whether a cycle closes after optimizer step `step` (counted from 1)."""
    return step >= accumulation_steps and (step - accumulation_steps) % regrow_every == 0


def next_close(steps_done: int, regrow_every: int, accumulation_steps: int) -> int:
    """The first close after `steps_done` finished steps."""
    if steps_done < accumulation_steps:
        return accumulation_steps
    cycles = (steps_done - accumulation_steps) // regrow_every + 1
    return accumulation_steps + cycles * regrow_every


def in_window(steps_done: int, regrow_every: int, accumulation_steps: int) -> bool:
    """Whether the step after `steps_done` finished ones is one of the last `accumulation_steps` before a close."""
    return next_close(steps_done, regrow_every, accumulation_steps) - steps_done <= accumulation_steps


def is_skipped(step: int, total_steps: int | None, stop_regrowing_at: float) -> bool:
    """Whether a close at `step` comes too late in the run to take place."""
    # A quotient: 0.29 * 100 is less than 29.
    return total_steps is not None and step / total_steps > stop_regrowing_at


def regrow_rate(schedule: str, initial: float, step: int, total_steps: int) -> float:
    """Share of the deltas that a close at `step` replaces.

    linear: ``initial * (1 - t / T)``; cosine: ``initial * (1 + cos(pi t / T)) / 2``; constant: ``initial``. Past the
    end of the run the schedule stays where it ended.
    """
    progress = min(1.0, step / total_steps)
    if schedule == "linear":
        return initial * (1.0 - progress)
    if schedule == "cosine":
        return initial * (1.0 + math.cos(math.pi * progress)) / 2.0
    return initial


def lr_following_rate(initial: float, lr: float, max_lr: float) -> float:
    """The rate when nobody knows the length of the run: it falls as the learning rate does."""
    return initial * lr / max_lr if max_lr > 0 else initial
