"""Model folders: JSON files, copies of the files besides weights, and writing a folder whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checks import json_object

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
    inside, found = folder.resolve(), source.resolve()
    allowed = [inside]
    if inside.parent.name == "snapshots":
        allowed.append(inside.parent.parent / "blobs")
    if not any(found.is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{source} is a link to {found}, outside of {folder}: put a copy of the file there if it is to be in the "
            "result, or remove the link"
        )
    shutil.copyfile(found, target)


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


@contextmanager
def whole_folder(target: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `target` to write into, and rename it to `target` when the block is left.

    On any error, a full disk included, the temporary folder is removed and `target` is left as it was.

    Args:
        target: the folder to make. Its parents are created.
        overwrite: replace what is there; else only an empty folder may be there.

    Raises:
        FileExistsError: there is something at `target`. Raised before anything is written.
    """
    target = Path(target)
    refuse_existing(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work
        # mkdtemp makes a private folder; the result gets the permissions of any new folder.
        umask = os.umask(0)
        os.umask(umask)
        work.chmod(0o777 & ~umask)
        _put_in_place(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def refuse_existing(target: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise a FileExistsError if `target` exists and must not be replaced. Long work calls this before it begins."""
    target = Path(target)
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists already: choose another folder, or allow overwriting")


def _put_in_place(work: Path, target: Path) -> None:
    if not target.exists():
        work.rename(target)
        return
    # A folder cannot replace one that is not empty in one step; the old one is kept until the new one is there.
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / target.name)
    try:
        work.rename(target)
    except BaseException:
        (old / target.name).rename(target)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)
