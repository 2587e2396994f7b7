"""What the examples print."""

from __future__ import annotations

import time


def heading(text: str) -> None:
    """Prints the start of a section."""
    print(f"\n{text}", flush=True)


def field(name: str, value: object) -> None:
    """Prints one named value of a section."""
    print(f"  {name:<14} {value}", flush=True)


class Clock:
    """Names the parts of a run and how many seconds each took."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends the part ``name``, which began with the clock or with the last lap."""
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 1)
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name.replace('_', ' ')} {seconds:.0f}" for name, seconds in self.laps.items())
        return f"{sum(self.laps.values()):.0f} s ({parts})"
