"""Converts adapters of other methods and libraries into SpIEL adapters, and SpIEL adapters into other formats."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..files.checkpoint import Base
from ..files.folder import refuse_existing, refuse_inputs
from .from_composable_sft import FILE_NAME, convert_composable_sft, is_composable_sft
from .from_peft import convert_sft_fork, convert_supertuning, read_peft_config
from .result import Conversion, Progress
from .shira import convert_shira, export_shira
from .to_patches import SparsePatch, export_dense_diff, export_sparse_patch, read_sparse_patches, sparse_patches

__all__ = [
    "KINDS",
    "Conversion",
    "SparsePatch",
    "convert_adapter",
    "convert_composable_sft",
    "convert_sft_fork",
    "convert_shira",
    "convert_supertuning",
    "detect_kind",
    "export_dense_diff",
    "export_shira",
    "export_sparse_patch",
    "read_sparse_patches",
    "sparse_patches",
]

_CONVERTERS = {
    "composable-sft": convert_composable_sft,
    "sft": convert_sft_fork,
    "shira": convert_shira,
    "supertuning": convert_supertuning,
}
KINDS = tuple(_CONVERTERS)


def detect_kind(source: str | os.PathLike[str]) -> str:
    """Find the format of an adapter, one of `KINDS`.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: adapters of its format cannot be converted; the message names the format.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if is_composable_sft(path):
        return "composable-sft"
    if not path.is_dir():
        raise ValueError(f"{path} is neither a folder nor a file named {FILE_NAME}")
    kind = str(read_peft_config(path).get("peft_type"))
    if kind.lower() in KINDS:
        return kind.lower()
    config = path / "adapter_config.json"
    if kind == "SPIEL":
        raise ValueError(f"{config}: it is a SpIEL adapter already")
    raise ValueError(
        f"{config}: adapters of peft_type {kind!r} are not sparse differences of weights, so they cannot be converted; "
        f"supported are {', '.join(KINDS)}"
    )


def convert_adapter(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: Base | None = None,
    kind: str | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Conversion:
    """Turn the adapter of another method or library into a SpIEL adapter folder.

    Args:
        source: the adapter's folder, or a ``pytorch_diff.bin``.
        out: folder to write, whole or not at all.
        base: the model it was made for: a checkpoint folder, a safetensors file, a transformers config, a model, or a
            dict from tensor names to shapes. Needed for SHiRA; needed with values where full tensors must be computed.
        kind: one of `KINDS`; None: found by `detect_kind`.
        overwrite: replace what is at `out`.
        progress: called with (done, total, what).
        options: further arguments of the converter, such as ``others="drop"`` of `convert_composable_sft`.

    Raises:
        FileNotFoundError, ValueError: the file or tensor at fault is named, and nothing is written.
        FileExistsError: there is something at `out`.
    """
    kind = detect_kind(source) if kind is None else kind.lower()
    if kind not in _CONVERTERS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "shira" and base is None:
        raise ValueError(f"{source}: SHiRA stores rows and columns; pass base= for the shapes of the weights")
    refuse_inputs(out, {"source": source, "base": base}, "out")
    refuse_existing(out, overwrite)
    try:
        return _CONVERTERS[kind](source, out, base, overwrite=overwrite, progress=progress, **options)
    except TypeError as error:
        if options and "unexpected keyword" in str(error):
            raise ValueError(f"{kind} has no option {sorted(options)}") from error
        raise
