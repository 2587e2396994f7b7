"""The output folder of a run: finds, saves and removes the Trainer's checkpoints, the adapter and the merged model."""

from __future__ import annotations

import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..checks import json_object
from ..files.folder import clear_leftovers, give_up_set_aside, set_aside, whole_folder, work_folder
from .data import InputError

ADAPTER = "adapter"
MERGED = "merged"
STATE = "trainer_state.json"
# A checkpoint holds this file while the Trainer writes it. One that still has it was left by a run that was killed.
WRITING = "spiel-peft-unfinished.json"
# The name under which checkpoints of an earlier run are set aside until the new one has a checkpoint.
_EARLIER = "checkpoints"
# Files of the Trainer besides the adapter's weights: JSON files, and files of torch.save.
_JSON = ("adapter_config.json", STATE)
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_OF_TORCH = ("optimizer.pt", "scheduler.pt")

_LOG = logging.getLogger(__name__)


def find_checkpoint(folder: Path, resume: bool, overwrite: bool, weights_only: bool = False) -> Path | None:
    """The last complete checkpoint in an output folder if the run is to be resumed, else None.

    A newer checkpoint that is not complete, as a kill leaves it, is passed over, and a warning says so.

    Args:
        folder: the output folder.
        resume, overwrite: the options of these names.
        weights_only: the Trainer saves no optimizer (``save_only_model``), so a checkpoint is complete without.

    Raises:
        InputError: `resume` was given and there is no complete checkpoint.
        FileExistsError: the folder holds a run, and neither `resume` nor `overwrite` was given.
    """
    remove_leftovers(folder)
    numbered = checkpoints_in(folder)
    if resume:
        return _last_complete(folder, numbered, weights_only)
    results = (folder / ADAPTER, folder / MERGED, folder / STATE)
    found = [path for path in (*results, *own_checkpoints(folder)) if path.exists()]
    if found and not overwrite:
        raise FileExistsError(
            f"{folder} holds a run already ({found[0].name}): --resume goes on with it, --overwrite begins anew, or "
            "choose another folder"
        )
    return None


def _last_complete(folder: Path, numbered: Sequence[Path], weights_only: bool) -> Path:
    passed: list[str] = []
    for checkpoint in reversed(numbered):
        problem = what_is_missing(checkpoint, weights_only)
        if problem is None:
            if passed:
                _LOG.warning("%s is not complete: resuming from %s", "; ".join(passed), checkpoint)
            return checkpoint
        passed.append(f"{checkpoint} ({problem})")
    if not passed:
        raise InputError(f"--resume: {folder} has no checkpoint; leave --resume out to begin")
    raise InputError(
        f"--resume: {folder} has no checkpoint that is complete: {'; '.join(passed)}; give --overwrite instead of "
        "--resume to begin anew"
    )


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders in an output folder that have the name of a checkpoint, sorted by their step."""
    found = [(re.fullmatch(r"checkpoint-([0-9]+)", path.name), path) for path in folder.glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match and path.is_dir())]


def own_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of SpIEL adapters that the Trainer has written to the end, sorted by their step."""
    return [path for path in checkpoints_in(folder) if (path / STATE).is_file() and _is_spiel(path)]


def _is_spiel(checkpoint: Path) -> bool:
    try:
        return json_object(checkpoint / "adapter_config.json").get("peft_type") == "SPIEL"
    except ValueError:
        return False


def _is_half_written(path: Path) -> bool:
    """Whether a folder can be what a kill left of a checkpoint: it is empty or has a file that the Trainer writes."""
    names = (*_JSON, *_WEIGHTS, *_OF_TORCH, "training_args.bin")
    return not any(path.iterdir()) or any((path / name).exists() for name in names)


def what_is_missing(checkpoint: str | os.PathLike[str], weights_only: bool = False) -> str | None:
    """Say which file that resuming needs is missing or damaged; None if the checkpoint is complete.

    Args:
        checkpoint: the checkpoint's folder.
        weights_only: the Trainer saves no optimizer, so none is needed.
    """
    checkpoint = Path(checkpoint)
    if (checkpoint / WRITING).exists():
        return "the run was killed while it was written"
    try:
        for name in _JSON:
            json_object(checkpoint / name)
        weights = next((checkpoint / name for name in _WEIGHTS if (checkpoint / name).is_file()), None)
        if weights is None:
            return f"{_WEIGHTS[0]} is missing"
        if weights.suffix == ".safetensors":
            with safe_open(weights, framework="pt") as tensors:
                if not tensors.keys():
                    return f"{weights.name} is empty"
        files = [] if weights.suffix == ".safetensors" else [weights]
        if not weights_only:
            files += [checkpoint / name for name in _OF_TORCH]
            files += checkpoint.glob("scaler.pt")  # of runs in float16
            files += sorted(checkpoint.glob("rng_state*.pth")) or [checkpoint / "rng_state.pth"]
        return next((problem for path in files if (problem := _damage(path)) is not None), None)
    except SafetensorError as error:
        return f"{_WEIGHTS[0]} cannot be read: {error}"
    except (OSError, ValueError) as error:
        return " ".join(str(error).replace(f"{checkpoint}{os.sep}", "").split())


def _damage(path: Path) -> str | None:
    """What is wrong with a file of torch.save, which is a zip archive with checksums."""
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        with zipfile.ZipFile(path) as archive:
            return None if archive.testzip() is None else f"{path.name} is damaged"
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        return f"{path.name} cannot be read: {error}"


def steps_of(checkpoint: Path) -> int:
    """The optimizer step at which a checkpoint was saved, as its name says."""
    return int(checkpoint.name.rpartition("-")[2])


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left half-written in an output folder, and log what was removed."""
    for path in checkpoints_in(folder):
        if (path / WRITING).is_file():
            shutil.rmtree(path)
            _LOG.warning("%s, left half-written by a run that was killed, was removed", path)
    for name in (_EARLIER, ADAPTER, MERGED):
        clear_leftovers(folder, name)


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """On an error remove the folder and its parents, if they did not exist before the block and are empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


class Checkpoints:
    """The checkpoints of one run: which folders it may write, replace and remove.

    The folders that were there when the run began stay, but for checkpoints of the run that it resumes or replaces.

    Args:
        folder: the output folder.
        resume: the earlier checkpoints belong to this run.
        overwrite: the earlier checkpoints are replaced by those of this run.
    """

    def __init__(self, folder: Path, resume: bool, overwrite: bool) -> None:
        self.folder = folder
        self.own = own_checkpoints(folder) if resume else []
        self.replaced = own_checkpoints(folder) if overwrite else []
        earlier = resume or overwrite
        others = [path for path in checkpoints_in(folder) if path not in (*self.own, *self.replaced)]
        self.foreign = [path for path in others if not (earlier and _is_half_written(path))]

    def refuse_foreign(self, steps: int, every: int) -> None:
        """Raise a FileExistsError if a checkpoint would be written into a folder that is no checkpoint of a run.

        Args:
            steps: the last step of the run.
            every: steps between checkpoints.
        """
        for path in self.foreign:
            step = steps_of(path)
            if step <= steps and (step % every == 0 or step == steps):
                raise FileExistsError(
                    f"{path} is there and is no checkpoint of an earlier run, but step {step} would be saved there; "
                    "choose another --output-dir, or move the folder"
                )

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Mark a checkpoint as unfinished while the block writes it; after an error it is removed.

        The checkpoints of the replaced run, and one of the same step, are set aside. They are removed once the new one
        is complete, and put back after an error.
        """
        path = self.folder / f"checkpoint-{step}"
        # A damaged checkpoint that was passed over is there, too: files of two runs must not mix.
        outdated = list(dict.fromkeys([*self.replaced, *([path] if path.exists() else [])]))
        if not outdated:
            with self._writing(path):
                yield
        else:
            with work_folder(self.folder, _EARLIER) as box:
                set_aside(outdated, box)
                with self._writing(path):
                    yield
                give_up_set_aside(box)
            self.replaced = []
        self.own = [*(other for other in self.own if other != path), path]

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        path.mkdir()
        (path / WRITING).write_text('{"made_by": "spiel-peft"}\n', encoding="utf-8")
        try:
            yield
            (path / WRITING).unlink()
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise

    def keep(self, limit: int | None, best: str | None) -> None:
        """Remove this run's oldest checkpoints beyond `limit`; the best and the last one stay."""
        if not limit or limit < 1:
            return
        protected = {self.own[-1], *([Path(best)] if best else [])}
        excess = len(self.own) - max(limit, len(protected))
        for path in [path for path in self.own if path not in protected][: max(0, excess)]:
            shutil.rmtree(path, ignore_errors=True)
            self.own.remove(path)

    def remove_replaced(self) -> None:
        """Remove the checkpoints of the replaced run, if the new one has saved none of its own."""
        for path in self.replaced:
            shutil.rmtree(path)
        self.replaced = []


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
