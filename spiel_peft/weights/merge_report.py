"""Counts and reports the deltas that rounding loses in a merge."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

logger = logging.getLogger(__name__)

# Share of lost deltas above which a merge warns.
NOTABLE = 0.01
MERGE_IN_FLOAT32 = "Load the base in float32 and merge there, or merge files with dtype='float32'."


@dataclass
class MergeLoss:
    """Counts of merged deltas, and of those that rounding has lost.

    Attributes:
        total: entries whose float32 sum differs from the original.
        lost: those of them whose weight moved by less than half of the delta.
    """

    total: int = 0
    lost: int = 0

    @property
    def share(self) -> float:
        """Lost deltas as a share of all, 0 if there are none."""
        return self.lost / self.total if self.total else 0.0

    def __iadd__(self, other: MergeLoss) -> MergeLoss:
        self.total += other.total
        self.lost += other.lost
        return self


@dataclass
class MergeReport:
    """The result of a merge into files.

    Attributes:
        folder: the merged checkpoint.
        loss: counts over all deltas.
        modules: the same counts by module name.
        dtypes: dtypes of the weights that deltas were merged into.
        untied: parameters that were tied to another one and have a tensor of their own now.
    """

    folder: Path
    loss: MergeLoss = field(default_factory=MergeLoss)
    modules: dict[str, MergeLoss] = field(default_factory=dict)
    dtypes: set[str] = field(default_factory=set)
    untied: list[str] = field(default_factory=list)


def count_lost(original: Tensor, wanted: Tensor, merged: Tensor, start: Tensor | None = None) -> MergeLoss:
    """Count the deltas that a merge of some entries has lost to rounding.

    Args:
        original, wanted, merged: ``[u]`` floating: entries before the merge, the exact sums, entries after it.
        start: ``[u]``, the entries as they would be stored without a delta, if that differs from `original`.
    """
    delta = wanted.double() - original.double()
    moved = merged.double() - (original if start is None else start).double()
    touched = delta != 0
    lost = touched & (moved * delta.sign() < delta.abs() / 2)
    return MergeLoss(total=int(touched.sum()), lost=int(lost.sum()))


def log_loss(loss: MergeLoss, dtype: str, how: str) -> None:
    """Log how many deltas rounding lost: as a warning if they are more than 1%, else as information.

    Args:
        loss: counts of the whole merge.
        dtype: name of the merged weights' dtype.
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
