"""What rounding loses when deltas are merged, counted and said."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

logger = logging.getLogger(__name__)

# Share of lost deltas from which a merge says so.
NOTABLE = 0.01
MERGE_IN_FLOAT32 = "Load the base in float32 and merge there, or merge files with dtype='float32'."


@dataclass
class MergeLoss:
    """Counts of merged deltas and of those that rounding has swallowed.

    Attributes:
        total: entries whose exact sum differs from the original; a delta too small even for float32 is none.
        lost: those whose weight moved by less than half of the delta.
    """

    total: int = 0
    lost: int = 0

    @property
    def share(self) -> float:
        """Lost deltas per delta, 0 where there are none."""
        return self.lost / self.total if self.total else 0.0

    def __iadd__(self, other: MergeLoss) -> MergeLoss:
        self.total += other.total
        self.lost += other.lost
        return self


@dataclass
class MergeReport:
    """What a merge into files has done.

    Attributes:
        folder: the merged checkpoint.
        loss: of all deltas.
        modules: the same by module.
        dtypes: dtypes of the weights that deltas were merged into.
        untied: parameters that were tied to another one and have a tensor of their own now.
    """

    folder: Path
    loss: MergeLoss = field(default_factory=MergeLoss)
    modules: dict[str, MergeLoss] = field(default_factory=dict)
    dtypes: set[str] = field(default_factory=set)
    untied: list[str] = field(default_factory=list)


def count_lost(original: Tensor, wanted: Tensor, merged: Tensor, start: Tensor | None = None) -> MergeLoss:
    """Compare what a merge should have done to some entries with what it did.

    Args:
        original, wanted, merged: ``[u]`` floating: entries before the merge, the exact sums, entries after it.
        start: ``[u]`` the entries as they would be stored without a delta, where that is not as before the merge.
    """
    delta = wanted.double() - original.double()
    moved = merged.double() - (original if start is None else start).double()
    touched = delta != 0
    lost = touched & (moved * delta.sign() < delta.abs() / 2)
    return MergeLoss(total=int(touched.sum()), lost=int(lost.sum()))


def log_loss(loss: MergeLoss, dtype: str, how: str) -> None:
    """Say in the log what rounding lost, as a warning where that is notable.

    Args:
        loss: of the whole merge.
        dtype: of the merged weights.
        how: a sentence on how to merge without that loss.
    """
    if not loss.total:
        return
    level = logging.WARNING if loss.share > NOTABLE else logging.INFO
    hint = f" {how}" if loss.share > NOTABLE else ""
    logger.log(
        level,
        "Rounding to %s lost %d of %d merged deltas (%.1f%%): these weights moved by less than half of their delta.%s",
        dtype,
        loss.lost,
        loss.total,
        100 * loss.share,
        hint,
    )
