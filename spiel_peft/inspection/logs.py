"""The closes and losses of a training run, from the logs that trainers leave beside an adapter."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAINER_STATE = "trainer_state.json"
_FIELDS = ("rate", "replaced", "kept", "churn", "mean_abs_delta")


@dataclass(frozen=True)
class Close:
    """One close of a cycle, as `SpIELCallback` logs it.

    Attributes:
        step: optimizer step after which it took place.
        rate: share of the deltas that the schedule offered for replacement.
        replaced, kept: numbers of deltas.
        churn: share of the deltas that moved.
        mean_abs_delta: mean absolute delta before the close.
    """

    step: int
    rate: float
    replaced: int
    kept: int
    churn: float
    mean_abs_delta: float


@dataclass(frozen=True)
class Losses:
    """Losses by optimizer step: of the batches trained on, and of the evaluations."""

    train: dict[int, float]
    held_out: dict[int, float]


def find_log(folder: str | os.PathLike[str]) -> Path | None:
    """The log of the run that an adapter comes from: in its folder, in a trainer's checkpoint there, or one level up.

    Of several checkpoints the last one has the longest log.
    """
    folder = Path(folder)
    for place in (folder, folder.resolve().parent):
        for path in (place / TRAINER_STATE, *reversed(_checkpoints(place))):
            if _is_log(path):
                return path
    return None


def _checkpoints(folder: Path) -> list[Path]:
    numbered = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NUMBER.search(path.name))]
    return [path / TRAINER_STATE for _, path in sorted(numbered)]


_NUMBER = re.compile(r"-(\d+)$")


def _is_log(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        return bool(_closes(_load(path)))
    except ValueError:
        return False


def read_closes(log: str | os.PathLike[str]) -> list[Close]:
    """The closes in a ``trainer_state.json``, in the order of their steps.

    Args:
        log: the file, or a folder with one.

    Raises:
        FileNotFoundError: there is none. ValueError: it cannot be read, or holds no close.
    """
    path = _path(log)
    closes = _closes(_load(path))
    if not closes:
        raise ValueError(f"{path} logs no close of a cycle; give SpIELCallback() to the Trainer to have them logged")
    return closes


def read_losses(log: str | os.PathLike[str]) -> Losses:
    """The losses in a ``trainer_state.json``; arguments and errors as of `read_closes`."""
    path = _path(log)
    entries = _history(_load(path))
    try:
        found = [{int(e["step"]): float(e[key]) for e in entries if key in e} for key in ("loss", "eval_loss")]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} logs a loss without a step or a number: {error}") from error
    if not found[0]:
        raise ValueError(f"{path} logs no training loss; set logging_steps of the Trainer to have it logged")
    return Losses(*found)


def _path(log: str | os.PathLike[str]) -> Path:
    path = Path(log)
    if path.is_dir():
        found = find_log(path)
        if found is None:
            raise FileNotFoundError(
                f"{path} has no log of closes ({TRAINER_STATE}); they are logged where SpIELCallback() was given to "
                "the Trainer"
            )
        path = found
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return path


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def _history(content: Any) -> list[dict[str, Any]]:
    history = content.get("log_history") if isinstance(content, dict) else None
    return [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []


def _closes(content: Any) -> list[Close]:
    entries = [entry for entry in _history(content) if "spiel/churn" in entry]
    rows = [{key.removeprefix("spiel/"): value for key, value in entry.items()} for entry in entries]
    try:
        closes = [Close(int(row["step"]), *(_number(row, name) for name in _FIELDS)) for row in rows]
    except (KeyError, TypeError, ValueError):
        return []
    return sorted(closes, key=lambda close: close.step)


def _number(row: dict[str, Any], name: str) -> Any:
    return int(row[name]) if name in ("replaced", "kept") else float(row[name])
