"""Model folders: JSON files, copies of the files besides weights, and writing a folder whole or not at all."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ..checks import json_object

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_LOG = logging.getLogger(__name__)
# A temporary folder is named ".<what is made>.spiel-peft-<random>" and holds the marker.
_INFIX = ".spiel-peft-"
_MARKER = "spiel-peft-unfinished.json"
# In a temporary folder: what is being written, what is to be put back on an error, and what is to be removed.
_NEW, _OLD, _REPLACED = "new", "old", "replaced"

_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".tflite", ".ot"),
    ".index.json",
)
# A model card is about the model it was written for; the rest belongs to a training run or to an adapter.
_NOT_COPIED = ("README.md", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json"),
)
_FOLDERS = ("additional_chat_templates",)


def copy_other_files(base: Path, adapter: Path, out: Path) -> None:
    """Copy tokenizer, generation config, code and the like, but neither weights nor the files of a training run.

    An adapter's folder that has a tokenizer of its own (tokens were added) provides all of the tokenizer.

    Args:
        base: the model's folder.
        adapter: the adapter's folder.
        out: the folder to copy to.

    A symbolic link is copied as the file that it leads to, if that lies in the same folder, or in the ``blobs`` of the
    same repository of Hugging Face's cache, where ``snapshots/<revision>/<file>`` is a link to ``../../blobs/<hash>``.
    Any other link could bring a private file of this machine into a folder that is then published.

    Raises:
        ValueError: a file is a link that leads elsewhere; the message names it.
    """
    own_tokenizer = (adapter / "tokenizer_config.json").is_file()
    for path in sorted(base.iterdir()):
        if path.is_file() and _is_copied(path.name) and not (own_tokenizer and path.name in _TOKENIZER):
            _copy_file(path, out / path.name, base)
    tokenizer = adapter if own_tokenizer else base
    if own_tokenizer:
        for name in _TOKENIZER:
            if (adapter / name).is_file():
                _copy_file(adapter / name, out / name, adapter)
    for name in _FOLDERS:
        if (tokenizer / name).is_dir():
            shutil.copytree(
                tokenizer / name,
                out / name,
                copy_function=lambda source, target: _copy_file(Path(source), Path(target), tokenizer),
            )


def _copy_file(source: Path, target: Path, folder: Path) -> None:
    """Copy a file of a folder; see `copy_other_files` for what links may lead to."""
    shutil.copyfile(file_within(folder, source), target)


def file_within(folder: Path, source: Path) -> Path:
    """The real path of a file of a folder. Raises a ValueError if it leads out of it; see `copy_other_files`."""
    inside, found = folder.resolve(), source.resolve()
    allowed = [inside]
    if inside.parent.name == "snapshots":
        allowed.append(inside.parent.parent / "blobs")
    if not any(found.is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{source} is a link to {found}, outside of {folder}: put a copy of the file there if it is to be in the "
            "result, or remove the link"
        )
    return found


def _is_copied(name: str) -> bool:
    if name.startswith((".", "adapter_")) or name in _NOT_COPIED:
        return False
    return not name.endswith(_WEIGHTS)


def edit_config(folder: Path, changes: Mapping[str, Any], dtype: str | None) -> None:
    """Change fields of a ``config.json``, wherever in it they are, and the dtype of the weights.

    Args:
        folder: holds the file; without a file nothing is done.
        changes: new values by field. A field of the language model's own part of a config with parts is changed there.
        dtype: such as "bfloat16"; None leaves it.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    config = json_object(path)
    parts = [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]
    for name, value in changes.items():
        holders = [part for part in parts if name in part]
        if name == "vocab_size":
            holders = holders[:1]
        for part in holders or [config]:
            part[name] = value
    for part in parts if dtype is not None else ():
        for name in ("dtype", "torch_dtype"):
            if name in part:
                part[name] = dtype
    if dtype is not None and "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def refuse_inputs(target: str | os.PathLike[str], inputs: Mapping[str, object], name: str = "out_dir") -> None:
    """Raise a ValueError if writing `target` could change what is read: if it is an input, in one, or holds one.

    Links are followed, those in an input folder too. Commands call this before they read or write anything.

    Args:
        target: what is to be written.
        inputs: files and folders that are read, or sequences of them, by the name that the error gives them. What is no
            path, such as a model in memory, is ignored, and so is what does not exist.
        name: how the error calls `target`.
    """
    place = os.path.realpath(target)
    for label, given in inputs.items():
        for path in given if isinstance(given, (list, tuple)) else [given]:
            if not isinstance(path, (str, os.PathLike)) or not os.path.exists(path):
                continue
            for read in _places_read(path):
                shown = f"{name}: {os.fspath(target)}"
                if _holds(place, read):
                    raise ValueError(f"{shown} would replace {label} {path}, which is read; choose another folder")
                if _holds(read, place):
                    raise ValueError(f"{shown} is inside {label} {path}, which is read; choose another folder")


def _places_read(path: str | os.PathLike[str]) -> Iterator[str]:
    """The real path of an input, and those of all links in it: caches of models are folders of links."""
    yield os.path.realpath(path)
    for folder, folders, files in os.walk(path):
        for entry in (*folders, *files):
            if os.path.islink(os.path.join(folder, entry)):
                yield os.path.realpath(os.path.join(folder, entry))


def _holds(outer: str, inner: str) -> bool:
    """Whether `inner` is `outer` or inside of it. Both are real paths; files that have two names there are one."""
    if inner == outer or inner.startswith(outer.rstrip(os.sep) + os.sep):
        return True
    if not os.path.exists(outer):
        return False
    places = (Path(inner), *Path(inner).parents)
    return any(place.is_dir() and os.path.samefile(place, outer) for place in places)


@contextmanager
def whole_folder(target: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `target` to write into, and put it in the place of `target` at the end.

    On any error, a full disk included, the temporary folder is removed and `target` is left as it was. There is no
    moment at which neither the old folder nor the new one is there, where the system can exchange them in one step;
    elsewhere the next run puts back what a killed one had moved.

    Args:
        target: the folder to make. Its parents are created. If it is a link, the folder that it names is made.
        overwrite: replace what is there; else only an empty folder may be there.

    Raises:
        FileExistsError: there is something at `target`. Raised before anything is written.
    """
    refuse_existing(target, overwrite)
    place = Path(os.path.realpath(target))
    place.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(place.parent, place.name) as box:
        work = box / _NEW
        work.mkdir()
        yield work
        _put_in_place(work, place, box / _OLD)


def refuse_existing(target: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise a FileExistsError if `target` exists and must not be replaced. Long work calls this before it begins.

    What a killed run left beside `target` is cleared first; it can be the old folder, which is put back then.
    """
    place = Path(os.path.realpath(target))
    clear_leftovers(place.parent, place.name)
    if place.exists() and not overwrite and (not place.is_dir() or any(place.iterdir())):
        raise FileExistsError(f"{target} exists already: choose another folder, or allow overwriting")


@contextmanager
def work_folder(parent: Path, name: str) -> Iterator[Path]:
    """Make a temporary folder in `parent` that a later run can tell to be a leftover; it is removed after the block.

    A marker in the folder says what the folder is. The marker is locked as long as this process lives. What the block
    moves into the subfolder ``old`` is put back into `parent` at the end, and by the next run if this one is killed,
    unless something is in its place by then.

    Args:
        parent: an existing folder.
        name: what is written, a part of the temporary folder's name.
    """
    box = Path(tempfile.mkdtemp(prefix=_prefix(name), dir=parent))
    try:
        with open(box / _MARKER, "w", encoding="utf-8") as marker:
            _lock(marker)
            json.dump({"made_by": "spiel-peft", "for": name}, marker)
            marker.flush()
            yield box
    finally:
        _empty(box)


def clear_leftovers(parent: Path, name: str) -> None:
    """Remove the temporary folders that killed runs left for `name` in `parent`, and log what was removed.

    A folder counts as such by its name and the marker in it, and only if no living process holds the marker's lock.
    """
    if not parent.is_dir():
        return
    for box in sorted(parent.iterdir()):
        if not box.name.startswith(_prefix(name)) or box.is_symlink() or not (box / _MARKER).is_file():
            continue
        with suppress(OSError), open(box / _MARKER, "r+", encoding="utf-8") as marker:
            if not _lock(marker) or not _is_ours(marker.read(), name):
                continue
            back = _empty(box)
            put_back = f"; {', '.join(back)} was put back" if back else ""
            _LOG.warning("%s, left by a run that was killed, was removed%s", box, put_back)


def _prefix(name: str) -> str:
    # Shortened, as file systems limit names to 255 bytes. The marker has the whole name.
    return f".{os.fsencode(name)[:200].decode('utf-8', 'ignore')}{_INFIX}"


def _is_ours(text: str, name: str) -> bool:
    try:
        return bool(json.loads(text) == {"made_by": "spiel-peft", "for": name})
    except ValueError:
        return False


def _lock(marker: IO[str]) -> bool:
    """Lock the marker; False if another process has it. Without locks on this system a leftover cannot be told."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _empty(box: Path) -> list[str]:
    """Put back what is in ``old`` if nothing is in its place, and remove the rest; returns what was put back.

    The marker goes last: what a second kill leaves over is still known to be ours.
    """
    back = []
    for path in sorted((box / _OLD).iterdir()) if (box / _OLD).is_dir() else ():
        if not os.path.lexists(box.parent / path.name):
            path.rename(box.parent / path.name)
            back.append(path.name)
    for path in box.iterdir() if box.is_dir() else ():
        if path.name == _MARKER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    shutil.rmtree(box, ignore_errors=True)
    return back


def set_aside(paths: Sequence[Path], box: Path) -> None:
    """Move files and folders into ``old`` of a `work_folder` beside them, from where they are put back at its end."""
    (box / _OLD).mkdir(exist_ok=True)
    for path in paths:
        path.rename(box / _OLD / path.name)


def give_up_set_aside(box: Path) -> None:
    """Let what was set aside in a `work_folder` be removed at its end, instead of put back."""
    if (box / _OLD).exists():
        (box / _OLD).rename(box / _REPLACED)


def _put_in_place(work: Path, place: Path, old: Path) -> None:
    if not os.path.lexists(place):
        work.rename(place)
    elif not _exchange(work, place):
        old.mkdir()
        place.rename(old / place.name)
        work.rename(place)  # on an error the old folder is put back when `work_folder` ends


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step, as Linux can on most file systems; False if that is not possible."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
