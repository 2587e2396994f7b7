"""The output folder of a run: finds, saves and removes the Trainer's checkpoints, the adapter and the merged model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from ..files.folder import whole_folder
from .data import InputError

ADAPTER = "adapter"
MERGED = "merged"
# The Trainer writes this file last, so a checkpoint without it is incomplete.
STATE = "trainer_state.json"


def find_checkpoint(folder: Path, resume: bool, overwrite: bool) -> Path | None:
    """The last complete checkpoint in an output folder if the run is to be resumed, else None.

    Raises:
        InputError: `folder` is a file, or `resume` was given and there is no checkpoint.
        FileExistsError: the folder holds a run, and neither `resume` nor `overwrite` was given.
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
    """The complete checkpoints in an output folder, sorted by their step."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*")]
    numbered = [(int(match[1]), path) for match, path in found if match and (path / STATE).is_file()]
    return [path for _, path in sorted(numbered)]


def steps_of(checkpoint: Path) -> int:
    """The optimizer step at which a checkpoint was saved, as its name says."""
    return int(checkpoint.name.rpartition("-")[2])


def remove_unfinished(folder: Path) -> None:
    """Remove incomplete checkpoints, and then the output folder if it is empty."""
    for path in folder.glob("checkpoint-*"):
        if not (path / STATE).is_file():
            shutil.rmtree(path, ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def remove_checkpoints(folder: Path) -> None:
    """Remove the complete checkpoints of an earlier run, from which the new one could otherwise be resumed."""
    for checkpoint in checkpoints_in(folder):
        shutil.rmtree(checkpoint)


def remove_merged(folder: Path) -> None:
    """Remove the merged model of an earlier run, if there is one."""
    if (folder / MERGED).is_dir():
        shutil.rmtree(folder / MERGED)


def save_adapter(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Save the adapter and its tokenizer in an output folder; returns the adapter's folder."""
    with whole_folder(folder / ADAPTER, overwrite=True) as work:
        # Training never resizes the vocabulary, so PEFT need not look for resized embeddings in the base model.
        model.save_pretrained(str(work), save_embedding_layers=False)
        tokenizer.save_pretrained(str(work))
    return folder / ADAPTER


def save_merged(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Save the base model with the deltas added in an output folder; returns the merged model's folder.

    The model in memory is merged, and has no adapter afterwards.
    """
    with whole_folder(folder / MERGED, overwrite=True) as work:
        model.merge_and_unload().save_pretrained(str(work))
        tokenizer.save_pretrained(str(work))
    return folder / MERGED
