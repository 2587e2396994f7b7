"""The files of a model's folder besides its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .names import read_json

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
    """Copy tokenizer, generation config, code and the like, but neither weights nor what a training run left.

    An adapter's folder that has a tokenizer of its own (tokens were added) provides all of the tokenizer.

    Args:
        base: the model's folder. adapter: the adapter's. out: where to.
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
        folder: holds the file; nothing is done where there is none.
        changes: by field. A field of the language model's own part of a config with parts is changed there.
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
