"""What a close did, for logs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CycleReport:
    """One close of one adapter's cycle, summed over its matrices.

    Attributes:
        step: optimizer step after which it took place.
        rate: share of the deltas that the schedule offered for replacement.
        replaced: deltas that moved to another position.
        kept: deltas that stayed.
        mean_abs_delta: mean absolute delta before the close.
    """

    step: int
    rate: float
    replaced: int
    kept: int
    mean_abs_delta: float

    @property
    def churn(self) -> float:
        """Share of the deltas that moved."""
        total = self.replaced + self.kept
        return self.replaced / total if total else 0.0
