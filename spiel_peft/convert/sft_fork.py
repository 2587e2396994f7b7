"""From the adapters of the published SpIEL code (a fork of PEFT, peft_type "SFT") into SpIEL adapters.

Its files hold ``<module>.sft_delta.indices``, flat row-major positions (int32 or int64), and ``.values``, their deltas.
Positions are sorted when training starts and no longer after they have moved once.
"""

from __future__ import annotations

import os
from typing import Any

from ..files.adapter_file import StoredDelta
from .base import Base, BaseTensors, open_base
from .peft_source import PeftSource, need, read_peft_source
from .result import Conversion, Progress, finish, tracked

PEFT_TYPE = "SFT"
_MARKER = "sft_delta."
_NAMES = ("values", "indices")
_GROWTH = {"rigl": "accumulated_gradient", "sm3": "momentum"}
_FIELDS = {
    "reselection_steps": "regrow_every",
    "selection_accumulation_steps": "accumulation_steps",
    "initial_reselection_rate": "initial_regrow_rate",
}
_ONLY_THERE = ("dropout", "l2_reg")


def convert_sft_fork(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: Base | BaseTensors | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Turn an adapter of the published SpIEL code into a SpIEL adapter folder.

    Args:
        source: the adapter folder.
        out: folder to write.
        base: the base model (see `open_base`), to check names and positions against; optional.
        overwrite: replace what is at `out`.

    Raises:
        FileNotFoundError, ValueError: the file or tensor at fault is named, and nothing is written.
    """
    adapter = read_peft_source(source, PEFT_TYPE)
    tensors = None if base is None else open_base(base)
    deltas: dict[str, StoredDelta] = {}
    modules = adapter.modules(_MARKER, _NAMES)
    for module, entries in tracked(modules, progress):
        need(entries, _NAMES, module, adapter.path)
        deltas[module] = adapter.delta(module, entries["indices"], entries["values"], tensors)
    result = Conversion(PEFT_TYPE, 0, [])
    fields = {**adapter.fields(), **_cycle(adapter, result)}
    return finish(result, deltas, adapter.others(_MARKER), fields, out, str(adapter.path), overwrite)


def _cycle(adapter: PeftSource, result: Conversion) -> dict[str, Any]:
    """The settings of the cycle, for those who train the adapter on."""
    config = adapter.config
    fields = {ours: config[theirs] for theirs, ours in _FIELDS.items() if config.get(theirs) is not None}
    algorithm = config.get("selection_algorithm")
    if algorithm in _GROWTH:
        fields["growth"] = _GROWTH[algorithm]
    elif algorithm is not None:
        result.notes.append(f"selection_algorithm={algorithm!r} has no counterpart: the default growth is set")
    if config.get("dtype") in ("float32", "float16", "bfloat16"):
        fields["delta_dtype"] = config["dtype"]
    for name in _ONLY_THERE:
        if config.get(name):
            result.notes.append(f"{name}={config[name]} acts in training only and has no counterpart: left out")
    return fields
