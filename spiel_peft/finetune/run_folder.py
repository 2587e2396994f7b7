"""The folder of a run: the Trainer's checkpoints, and the adapter and the merged checkpoint beside them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from .data import InputError

ADAPTER = "adapter"
MERGED = "merged"
# The Trainer writes it last into a checkpoint.
STATE = "trainer_state.json"


def find_checkpoint(folder: Path, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, None without `resume`.

    Raises:
        InputError: it is no folder, or there is no checkpoint. FileExistsError: results of a run are in it.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output-dir {folder}: it is a file")
    checkpoints = checkpoints_in(folder)
    if resume:
        if not checkpoints:
            raise InputError(f"--resume: {folder} has no checkpoint; leave --resume out to begin")
        return checkpoints[-1]
    if (checkpoints or (folder / ADAPTER).exists()) and not overwrite:
        raise FileExistsError(
            f"{folder} holds a run already: --resume goes on with it, --overwrite begins anew, or choose another folder"
        )
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints that were written to the end, by their steps."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*")]
    numbered = [(int(match[1]), path) for match, path in found if match and (path / STATE).is_file()]
    return [path for _, path in sorted(numbered)]


def steps_of(checkpoint: Path) -> int:
    """Optimizer steps at which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def remove_unfinished(folder: Path) -> None:
    """Remove checkpoints that were not written to the end, and the folder if nothing else is in it."""
    for path in folder.glob("checkpoint-*"):
        if not (path / STATE).is_file():
            shutil.rmtree(path, ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def remove_merged(folder: Path) -> None:
    """Remove the merged checkpoint of an earlier run, if there is one."""
    if (folder / MERGED).is_dir():
        shutil.rmtree(folder / MERGED)
