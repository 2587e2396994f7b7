"""Converts sparse fine-tunings of composable-sft (Ansell et al., 2022) into SpIEL adapters.

The library writes ``pytorch_diff.bin``, a pickled dict of tables. ``diffs`` holds sparse differences by parameter name,
``abs`` the values of parameters trained in full. A difference is a dict of ``size`` (the parameter's shape), ``values``
``[k]`` and ``index_steps``: the gaps between the sorted flat positions, the first counted from 0, where the *first*
dimension runs fastest (column-major). Files of older versions name the tables ``body`` and ``head``, and hold torch
sparse tensors.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files.adapter_file import StoredDelta
from ..files.checkpoint import Base, Checkpoint, open_base
from .result import DROP, KEEP, Conversion, Progress, check_choice, finish, make_delta, tracked

FILE_NAME = "pytorch_diff.bin"
# Most entries of a tensor trained in full. No head or embedding has more, and a damaged file can claim any number.
_MOST_IN_FULL = 2**32
# Modules that PEFT adds to modules_to_save for a task.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def convert_composable_sft(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: Base | None = None,
    *,
    others: str = KEEP,
    task_type: str | None = None,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Turn a sparse fine-tuning of composable-sft into a SpIEL adapter folder.

    Differences of matrices become deltas. Biases of modules that have deltas are kept as PEFT keeps trained biases
    (``bias="spiel_only"``). Any other module with a difference that is no matrix (a LayerNorm), and modules trained in
    full, go into ``modules_to_save``. PEFT stores the values of both, so the base's values are needed.

    Args:
        source: ``pytorch_diff.bin`` or its folder.
        out: folder to write.
        base: the base model (see `open_base`); optional as long as there are differences of matrices only.
        others: what to do with tensors that are not the difference of a matrix. "keep": save them, or refuse where that
            is impossible. "drop": leave them out and report them.
        task_type, base_model_name_or_path: for the adapter's config; the source does not hold them.
        overwrite: replace what is at `out`.

    Raises:
        FileNotFoundError, ValueError: the file or tensor at fault is named, and nothing is written.
    """
    check_choice("others", others, (KEEP, DROP))
    path = _path_of(Path(source))
    diffs, full = _tables(path, _load(path))
    tensors = None if base is None else open_base(base)
    result = Conversion("composable-sft", 0, [])
    deltas: dict[str, StoredDelta] = {}
    rest: dict[str, tuple[StoredDelta, tuple[int, ...]]] = {}
    for name, entry in tracked(diffs, progress):
        positions, values, size = _entries(path, name, entry)
        if tensors is not None and tensors.shape(name, str(path)) != size:
            raise ValueError(
                f"{path}: tensor {name!r} has shape {size}, but {tensors.shape(name, str(path))} in {tensors.where}"
            )
        delta = make_delta(positions, values, math.prod(size), str(path), name)
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and len(size) > 1 and _carries_deltas(tensors, module):
            deltas[module] = delta
        elif delta.k:
            rest[name] = delta, size
    if others == DROP:
        result.dropped = sorted([*rest, *full])
        rest, full = {}, {}
    kept, fields = TensorsInFull(str(path), tensors, deltas, rest, full, task_type).collect()
    fields |= {"task_type": task_type, "base_model_name_or_path": base_model_name_or_path, "growth": "none"}
    if tensors is not None:
        unknown = sorted(name for name in full if tensors.find(name) is None)
        if unknown:
            result.notes.append(
                f"{tensors.where} does not have {', '.join(unknown[:3])}: load the adapter on a model that does"
            )
    result.notes.append('growth="none": the positions stay fixed if it is trained on, as in lottery-ticket tuning')
    return finish(result, deltas, kept, fields, out, str(path), overwrite)


def _path_of(source: Path) -> Path:
    path = source / FILE_NAME if source.is_dir() else source
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return path


def _load(path: Path) -> Any:
    # The library stores the first step as a numpy number. Building one runs no code from the file.
    scalar = type(np.int64(0)).__reduce__(np.int64(0))[0]
    integers = [type(np.dtype(kind)) for kind in ("int32", "int64")]
    allowed = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *integers]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it holds other objects than tensors, numbers and dicts, or is damaged. Reading those "
            f"could run code that came with the file. ({_first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    text = str(error)
    blocked = [line for line in text.splitlines() if "GLOBAL" in line]
    return (blocked or text.splitlines() or [type(error).__name__])[0].strip()[:200]


def _tables(path: Path, content: Any) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """The stored differences, and the tensors trained in full, both by parameter name."""
    if not isinstance(content, Mapping) or not {"diffs", "abs", "body"} & set(content):
        raise ValueError(f"{path} has none of the tables 'diffs', 'abs' and 'body'; it is no file of composable-sft")
    if content.get("block_sparses"):
        raise ValueError(
            f"{path}: 'block_sparses' holds {len(content['block_sparses'])} layers that replace the model's own; "
            "a sparse difference cannot express that"
        )
    unknown = sorted(set(content) - {"diffs", "abs", "body", "head", "block_sparses"})
    if unknown:
        raise ValueError(f"{path} has tables that this converter does not know: {unknown}")
    diffs = content.get("diffs", content.get("body")) or {}
    full = content.get("abs", content.get("head")) or {}
    for table in (diffs, full):
        if not isinstance(table, Mapping) or not all(isinstance(name, str) for name in table):
            raise ValueError(f"{path}: a table must map parameter names to tensors")
    dense = {}
    for name, entry in full.items():
        positions, values, size = _entries(path, name, entry)
        if math.prod(size) > _MOST_IN_FULL:
            raise ValueError(
                f"{path}: tensor {name!r} of 'abs' has the shape {size}, too large for one that is saved in full"
            )
        dense[name] = dense_of(make_delta(positions, values, math.prod(size), str(path), name), size)
    return diffs, dense


def _entries(path: Path, name: str, entry: Any) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Row-major positions ``[k]``, values ``[k]`` and shape of one stored tensor."""
    if isinstance(entry, Tensor):
        if not entry.is_floating_point():
            raise ValueError(f"{path}: tensor {name!r} has dtype {entry.dtype}, not a floating one")
        sparse = entry.coalesce() if entry.is_sparse else entry.detach().to_sparse().coalesce()
        size = tuple(sparse.shape)
        return _flat(sparse.indices(), size), sparse.values(), size
    if not isinstance(entry, Mapping) or not {"size", "index_steps", "values"} <= set(entry):
        raise ValueError(f"{path}: tensor {name!r} has none of the known encodings")
    size, values = _size(path, name, entry["size"]), entry["values"]
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.dim() != 1:
        raise ValueError(f"{path}: tensor {name!r}: its values must be one floating dimension")
    steps = _steps(path, name, entry["index_steps"])
    if steps.numel() != values.numel():
        raise ValueError(f"{path}: tensor {name!r} has {steps.numel()} index steps for {values.numel()} values")
    positions = steps.cumsum(0)
    if bool((steps[1:] < 1).any()):
        raise ValueError(f"{path}: tensor {name!r} has an index step below 1, so positions repeat or go back")
    if steps.numel() and not 0 <= int(positions[0]) <= int(positions[-1]) < math.prod(size):
        raise ValueError(f"{path}: tensor {name!r}: its index steps lead out of the shape {size}")
    return _flat(_unravel_column_major(positions, size), size), values.detach(), size


def _size(path: Path, name: str, size: Any) -> tuple[int, ...]:
    if not isinstance(size, (tuple, list)) or not size or not all(type(n) is int and n > 0 for n in size):
        raise ValueError(f"{path}: tensor {name!r}: 'size' must list positive integers, got {size!r}")
    return tuple(size)


def _steps(path: Path, name: str, steps: Any) -> Tensor:
    try:
        array = np.asarray(steps)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: tensor {name!r}: 'index_steps' is no list of integers") from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{path}: tensor {name!r}: 'index_steps' must be one list of integers")
    return torch.from_numpy(array.astype(np.int64))


def _unravel_column_major(positions: Tensor, size: tuple[int, ...]) -> Tensor:
    """``[k]`` flat positions, first dimension fastest -> ``[dims, k]`` coordinates."""
    coordinates = []
    for length in size:
        coordinates.append(positions % length)
        positions = positions // length
    return torch.stack(coordinates)


def _flat(coordinates: Tensor, size: tuple[int, ...]) -> Tensor:
    """``[dims, k]`` coordinates -> ``[k]`` flat positions, last dimension fastest."""
    flat = torch.zeros_like(coordinates[0])
    for row, length in zip(coordinates, size, strict=True):
        flat = flat * length + row
    return flat


def _carries_deltas(tensors: Checkpoint | None, module: str) -> bool:
    """Whether a module can carry deltas, as far as its kind is known."""
    return tensors is None or tensors.names is None or tensors.info(module) is not None


def is_composable_sft(source: Path) -> bool:
    """Whether a path is a ``pytorch_diff.bin`` or a folder with one."""
    return (source / FILE_NAME).is_file() or (source.is_file() and source.name == FILE_NAME)


def dense_of(delta: StoredDelta, shape: tuple[int, ...]) -> Tensor:
    """The dense tensor of this shape with the values of a delta, zero elsewhere."""
    dense = torch.zeros(math.prod(shape), dtype=delta.values.dtype)
    dense[delta.indices.long()] = delta.values
    return dense.view(shape)


class TensorsInFull:
    """Tensors of a fine-tuning that cannot be deltas, as PEFT stores them: trained biases and modules saved in full.

    PEFT stores values, so a difference needs the base's values.

    Args:
        where: the source file.
        base: the base model, if there is one.
        deltas: the deltas, by module name.
        diffs: differences of other parameters, with the parameter's shape, by parameter name.
        full: values of parameters trained in full, by parameter name.
        task_type: of the adapter; for some tasks PEFT saves and loads the model's head.
    """

    def __init__(
        self,
        where: str,
        base: Checkpoint | None,
        deltas: Mapping[str, StoredDelta],
        diffs: Mapping[str, tuple[StoredDelta, tuple[int, ...]]],
        full: Mapping[str, Tensor],
        task_type: str | None = None,
    ) -> None:
        self.where, self.base, self.deltas, self.diffs, self.full = where, base, deltas, diffs, full
        self.heads = _HEADS.get(task_type or "", ())
        self.task_type = task_type

    def collect(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors by their key in an adapter file, and the config fields that loading them needs."""
        changed = set(self.diffs) | set(self.full)
        both = sorted(
            set(self.full) & {f"{module}.weight" for module in self.deltas} | set(self.full) & set(self.diffs)
        )
        if both:
            raise ValueError(f"{self.where}: tensor {both[0]!r} is both a difference and saved in full")
        biases = {name for name in changed if name.removesuffix(".bias") in self.deltas and name.endswith(".bias")}
        tensors = self._biases() if biases else {}
        saved = sorted({self._module_of(name) for name in changed - biases} | self._head())
        for module in saved:
            tensors |= self._module(module)
        fields: dict[str, Any] = {"bias": "spiel_only"} if biases else {}
        if saved:
            fields["modules_to_save"] = saved
        return tensors, fields

    def _module_of(self, name: str) -> str:
        """The module to save for a tensor: the whole head for a tensor inside of it, else the tensor's own module."""
        parts = name.split(".")
        depth = next((i + 1 for i, part in enumerate(parts[:-1]) if part in self.heads), len(parts) - 1)
        return ".".join(parts[:depth])

    def _head(self) -> set[str]:
        """The head that PEFT loads for this task, whether it was changed or not."""
        if not self.heads:
            return set()
        names = [*self.full, *self.diffs, *(self.base.shapes if self.base is not None else ())]
        found = {self._module_of(name) for name in names if set(name.split(".")[:-1]) & set(self.heads)}
        if not found:
            raise ValueError(
                f"{self.where}: with task_type={self.task_type!r} PEFT loads the model's head "
                f"({' or '.join(self.heads)}) from the adapter, and the source has none; pass base= with the head, or "
                "leave task_type out"
            )
        return found

    def _biases(self) -> dict[str, Tensor]:
        """The biases of all adapted modules: PEFT expects none or all of them."""
        names = {f"{module}.bias" for module in self.deltas}
        known = {name for name in names if self.base is not None and self.base.find(name) is not None}
        found = known | (names & (set(self.diffs) | set(self.full)))
        return {name.removesuffix("bias") + "base_layer.bias": self._value(name) for name in found}

    def _module(self, module: str) -> dict[str, Tensor]:
        names = {name for name in (*self.diffs, *self.full) if name.startswith(f"{module}.")}
        if self.base is not None:
            names |= set(self.base.tensors_of(module))
            self._check_name(module)
        nested = sorted(name for name in names if "." in name.removeprefix(f"{module}."))
        if not module or (nested and module.rpartition(".")[2] not in self.heads):
            raise ValueError(
                f"{self.where}: tensor {min(names)!r} belongs to {module or 'the model'!r}, which has further modules "
                f"({', '.join(nested[:2])}) that would have to be saved in full with it; pass others='drop' to leave "
                "everything out that is not the difference of a matrix"
            )
        return {name: self._value(name) for name in names}

    def _check_name(self, module: str) -> None:
        # PEFT saves every module whose name ends with this one.
        owners = {name.rpartition(".")[0] for name in self.base.shapes}
        clashes = sorted(name for name in owners if name != module and name.endswith(module))
        if clashes and module in owners:
            raise ValueError(
                f"{self.where}: module {module!r} cannot be saved in full by that name, because PEFT would take "
                f"{clashes[0]!r} for it; pass others='drop'"
            )

    def _value(self, name: str) -> Tensor:
        if name in self.full:
            if self.base is not None and self.base.find(name) is not None:
                self._check_shape(name, self.full[name])
            return self.full[name]
        if self.base is None or not self.base.has_values:
            raise ValueError(
                f"{self.where}: tensor {name!r} cannot become a sparse delta, so it has to be saved in full, for which "
                "the values of the base model are needed; pass base=, or others='drop' to leave such tensors out"
            )
        value = self.base.value(name, self.where)
        if name in self.diffs:
            value = (value.float() + dense_of(*self.diffs[name]).float()).to(value.dtype)
        return value

    def _check_shape(self, name: str, tensor: Tensor) -> None:
        # A head may have another number of classes than the base's.
        expected = self.base.shape(name, self.where)
        if len(expected) != tensor.dim() or expected[1:] != tuple(tensor.shape)[1:]:
            raise ValueError(
                f"{self.where}: tensor {name!r} has shape {tuple(tensor.shape)}, but {expected} in {self.base.where}"
            )
