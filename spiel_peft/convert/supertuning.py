"""From PEFT's Super-Tuning adapters into SpIEL adapters.

They hold ``<module>.supertuning_values`` and ``.supertuning_indices``, flat row-major positions in order of magnitude.
Without indices (``save_precomputed_indices=False``) the positions are those of the base weight's largest or smallest
entries, in that order.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..files.adapter_file import StoredDelta
from .base import Base, BaseTensors, open_base
from .peft_source import PeftSource, need, read_peft_source
from .result import Conversion, Progress, finish, tracked

PEFT_TYPE = "SUPERTUNING"
_MARKER = "supertuning_"


def convert_supertuning(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: Base | BaseTensors | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Turn a Super-Tuning adapter into a SpIEL adapter folder.

    Args:
        source: the adapter folder.
        out: folder to write.
        base: the base model (see `open_base`), to check names and positions against; its values are needed if the
            adapter was saved without indices.
        overwrite: replace what is at `out`.

    Raises:
        FileNotFoundError, ValueError: the file or tensor at fault is named, and nothing is written. A Supra adapter,
            which adds a low-rank matrix, is refused.
    """
    adapter = read_peft_source(source, PEFT_TYPE)
    if adapter.config.get("r") is not None:
        raise ValueError(
            f"{adapter.folder / 'adapter_config.json'}: r={adapter.config['r']} makes it a Supra adapter, which adds a "
            "low-rank matrix to every weight; that is not sparse, so it cannot be a SpIEL adapter"
        )
    tensors = None if base is None else open_base(base)
    deltas: dict[str, StoredDelta] = {}
    result = Conversion(PEFT_TYPE, 0, [])
    modules = adapter.modules(_MARKER, ("values", "indices"))
    for module, entries in tracked(modules, progress):
        need(entries, ("values",), module, adapter.path)
        if "indices" not in entries:
            entries["indices"] = _positions(adapter, module, entries["values"], tensors)
        deltas[module] = adapter.delta(module, entries["indices"], entries["values"], tensors)
    if any(f"{name}.{_MARKER}indices" not in adapter.tensors for name in modules):
        result.notes.append(
            "The adapter was saved without indices: they were found again by the magnitude of the base's weights, "
            "which is right if the base, and the dtype it was loaded in, are those of the training"
        )
    result.notes.append('growth="none": the positions stay fixed if it is trained on, as in Super-Tuning')
    fields = {**adapter.fields(), "growth": "none"}
    return finish(result, deltas, adapter.others(_MARKER), fields, out, str(adapter.path), overwrite)


def _positions(adapter: PeftSource, module: str, values: Tensor, base: BaseTensors | None) -> Tensor:
    if base is None or not base.has_values:
        raise ValueError(
            f"{adapter.path}: tensor '{module}.{_MARKER}indices' is missing, as the adapter was saved with "
            "save_precomputed_indices=False; pass base= with the values of the model it was trained on"
        )
    scores = base.value(f"{module}.weight", str(adapter.path)).abs().flatten()
    if values.numel() > scores.numel():
        raise ValueError(f"{adapter.path}: module {module!r} has more values than its weight has entries")
    return torch.topk(scores, k=values.numel(), largest=bool(adapter.config.get("select_top", True))).indices
