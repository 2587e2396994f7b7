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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises ValueError, naming the file, if it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} cannot be read: it is not a JSON object")
    return value


def copy_other_files(base: Path, adapter: Path, out: Path) -> None:
    """Copy tokenizer, generation config, code and the like, but neither weights nor the files of a training run.

    An adapter's folder that has a tokenizer of its own (tokens were added) provides all of the tokenizer.

    Args:
        base: the model's folder.
        adapter: the adapter's folder.
        out: the folder to copy to.
    """
    own_tokenizer = (adapter / "tokenizer_config.json").is_file()
    for path in sorted(base.iterdir()):
        if path.is_file() and _is_copied(path.name) and not (own_tokenizer and path.name in _TOKENIZER):
            shutil.copyfile(path, out / path.name)
    tokenizer = adapter if own_tokenizer else base
    if own_tokenizer:
        for name in _TOKENIZER:
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, out / name)
    for name in _FOLDERS:
        if (tokenizer / name).is_dir():
            shutil.copytree(tokenizer / name, out / name)


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
    config = read_json(path)
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
