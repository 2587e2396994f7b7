"""Timing: interleaved repetitions, their quantiles, and time budgets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Action = Callable[[], Any]

# Larger than the second-level cache of every GPU.
_FLUSH_BYTES = 256 * 2**20
# Clearing the cache so often takes a GPU longer than any host needs to launch an operation.
_MAX_FLUSHES = 32


class Clock:
    """Counts down a time budget in seconds; None never runs out."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        self.began = time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def left(self) -> float:
        return float("inf") if self.seconds is None else self.seconds - self.elapsed()

    def expired(self) -> bool:
        return self.left() <= 0

    def part(self, share: float) -> Clock:
        """A new clock for this share of the time left."""
        return Clock(None if self.seconds is None else max(0.0, self.left() * share))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_seconds(action: Action, device: torch.device) -> float:
    """Seconds from the call until the device has finished."""
    synchronize(device)
    began = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - began


class DeviceTimer:
    """Times short operations; on a GPU with events, a cold second-level cache and a filled launch queue."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_gpu = device.type == "cuda"
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if on_gpu else None
        self._flushes = 2

    def seconds(self, action: Action) -> float:
        if self.flush is None:
            return wall_seconds(action, self.device)
        while True:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # This clears the cache, and keeps the device busy while the host launches the action.
            for _ in range(self._flushes):
                self.flush.zero_()
            start.record()
            action()
            end.record()
            waited_for_host = start.query()
            torch.cuda.synchronize(self.device)
            if not waited_for_host or self._flushes >= _MAX_FLUSHES:
                return start.elapsed_time(end) / 1e3
            # The device had begun before the host was ready, so the time would be the host's. (An action that waits
            # for the device itself always ends here.)
            self._flushes *= 2


def interleave(
    actions: Mapping[str, Action],
    repetitions: int,
    device: torch.device,
    clock: Clock | None = None,
    measure: Callable[[Action], float] | None = None,
) -> dict[str, list[float]]:
    """Time every action once per round, so that other load on the machine slows all of them alike.

    Args:
        actions: by name; already warmed up.
        repetitions: the largest number of rounds.
        clock: no further round begins once it has run out (the first one always runs).
        measure: seconds of one call; `wall_seconds` by default.
    """
    measure = measure or (lambda action: wall_seconds(action, device))
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    names = list(actions)
    for number in range(repetitions):
        # The action before influences the caches, so the order changes from round to round.
        shift = number % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            seconds[name].append(measure(actions[name]))
        if clock is not None and clock.expired():
            break
    return seconds


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def quantile(values: Sequence[float], share: float) -> float:
    """Quantile with linear interpolation: share 0 is the smallest value, 1 the largest."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
