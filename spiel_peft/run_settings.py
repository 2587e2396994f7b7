"""The settings that a run's training state depends on: saved with it, and compared before it is taken back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .training_state import GROWTH, SETTINGS

# What each difference means to a user who resumes.
_REMEDIES = {
    "num_deltas": "another budget; set r, density or num_deltas as the checkpoint has it",
    "weight_shape": "another model; resume on the model that the checkpoint was made with",
    "growth": "another growth criterion",
}


@dataclass(frozen=True)
class RunSettings:
    """What a run was trained with, as far as the one that resumes it has to know.

    The first three must be the same. Whatever else a config says of the cycle may change: it acts on later closes.

    Attributes:
        num_deltas: k of this matrix.
        weight_shape: the adapted weight, seen as a matrix ``(rows, cols)``.
        growth: name of the growth criterion.
        regrow_every, accumulation_steps: as in the config, optimizer steps; with other ones a resumed run goes on by
            the new schedule, which is told to the user.
    """

    num_deltas: int
    weight_shape: tuple[int, int]
    growth: str
    regrow_every: int
    accumulation_steps: int

    @property
    def numel(self) -> int:
        """Entries of the adapted weight."""
        rows, cols = self.weight_shape
        return rows * cols

    def tensors(self) -> dict[str, Tensor]:
        """Five int64 numbers, and the criterion's name as UTF-8 bytes: what an adapter file can hold."""
        numbers = [self.num_deltas, *self.weight_shape, self.regrow_every, self.accumulation_steps]
        return {SETTINGS: torch.tensor(numbers), GROWTH: torch.tensor(list(self.growth.encode()), dtype=torch.uint8)}


def check_settings(tensors: Mapping[str, Tensor], own: RunSettings) -> tuple[str, str] | None:
    """Name the tensor that says another run was saved than `own` can resume, and how it differs; None if it fits.

    Both tensors are optional, but only together.
    """
    numbers, growth = tensors.get(SETTINGS), tensors.get(GROWTH)
    if numbers is None and growth is None:
        return None
    for name, tensor in ((SETTINGS, numbers), (GROWTH, growth)):
        if tensor is None:
            return name, "is missing, while the rest of the run's settings is there"
    if numbers.dtype != torch.int64 or tuple(numbers.shape) != (5,):
        return SETTINGS, f"must be five int64 numbers, got {numbers.dtype} of shape {tuple(numbers.shape)}"
    if growth.dtype != torch.uint8 or growth.dim() != 1:
        return GROWTH, f"must be bytes, got {growth.dtype} of shape {tuple(growth.shape)}"
    k, rows, cols, *cycle = numbers.tolist()
    if min(k, rows, cols, *cycle) < 1:
        return SETTINGS, f"has a number out of range ({numbers.tolist()})"
    name = bytes(growth.tolist()).decode(errors="replace")
    return _difference(RunSettings(k, (rows, cols), name, *cycle), own)


def _difference(saved: RunSettings, own: RunSettings) -> tuple[str, str] | None:
    theirs, ours = asdict(saved), asdict(own)
    for field, remedy in _REMEDIES.items():
        if theirs[field] != ours[field]:
            what = (
                f"is of a run with {field}={theirs[field]!r}, the adapter to be resumed has {field}={ours[field]!r} "
                f"({remedy}). Resume with the settings of the checkpoint; to begin a new run from its deltas, load it "
                "with is_trainable=False, save it, and load that"
            )
            return (GROWTH if field == "growth" else SETTINGS), what
    return None
