"""What an adapter on disk holds, in numbers, and what the log of its training run says."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter_format import split_file_key
from ..config import SpIELConfig
from ..files.adapter_file import PREFIX, AdapterFile, StoredDelta, read_whole_adapter
from ..files.checkpoint import Base, Checkpoint, open_base
from ..state import PROGRESS, SETTINGS, STATE_KEYS

# Fields of a config that say how an adapter was made; the others select modules or are PEFT's own bookkeeping.
_CONFIG_FIELDS = (
    "growth",
    "regrow_every",
    "accumulation_steps",
    "candidates",
    "initial_regrow_rate",
    "regrow_schedule",
    "total_steps",
    "target_modules",
    "target_parameters",
    "modules_to_save",
    "bias",
    "ensure_weight_tying",
    "delta_dtype",
    "seed",
    "task_type",
    "base_model_name_or_path",
)

TRAINER_STATE = "trainer_state.json"
_CLOSE_FIELDS = ("rate", "replaced", "kept", "churn", "mean_abs_delta")
_CHECKPOINT_NUMBER = re.compile(r"-(\d+)$")


@dataclass(frozen=True)
class ModuleFacts:
    """One sparse delta in numbers.

    Attributes:
        module: name of the adapted module in the base model, or of the parameter where that is a target itself.
        deltas: number of values.
        shape: of the weight; None if neither a base nor the file's training state tells.
        rows: number of rows of the weight seen as a matrix; None as for `shape`.
        dtype: of the values.
        norm: square root of the sum of squares.
        mean_abs, max_abs: of the values.
        zeros: values that are exactly zero.
    """

    module: str
    deltas: int
    shape: tuple[int, ...] | None
    rows: int | None
    dtype: str
    norm: float
    mean_abs: float
    max_abs: float
    zeros: int

    @property
    def weights(self) -> int | None:
        """Entries of the weight."""
        return None if self.shape is None else math.prod(self.shape)

    @property
    def density(self) -> float | None:
        """Share of the weight's entries that have a delta."""
        return None if not self.weights else self.deltas / self.weights


@dataclass(frozen=True)
class Progress:
    """How far a run was when the adapter was saved.

    Attributes:
        step: optimizer steps that counted.
        closes: closed cycles.
        total_steps: steps of the whole run, 0 if unknown.
    """

    step: int
    closes: int
    total_steps: int


@dataclass(frozen=True)
class AdapterFacts:
    """One adapter folder in numbers.

    Attributes:
        folder: the adapter's folder.
        adapter: config and tensors.
        modules: sorted by name, layers by their number.
        training: progress of the run, if the file holds training state.
        file_bytes: size of the tensors' file in bytes.
    """

    folder: Path
    adapter: AdapterFile
    modules: list[ModuleFacts]
    training: Progress | None
    file_bytes: int

    @property
    def deltas(self) -> int:
        return sum(module.deltas for module in self.modules)

    @property
    def weights(self) -> int | None:
        """Entries of all adapted weights; None if a shape is not known."""
        sizes = [module.weights for module in self.modules]
        return None if None in sizes else sum(sizes)  # type: ignore[arg-type]

    @property
    def density(self) -> float | None:
        return None if not self.weights else self.deltas / self.weights

    @property
    def norm(self) -> float:
        return math.sqrt(sum(module.norm**2 for module in self.modules))

    @property
    def max_abs(self) -> float:
        return max((module.max_abs for module in self.modules), default=0.0)

    @property
    def mean_abs(self) -> float:
        total = sum(module.mean_abs * module.deltas for module in self.modules)
        return total / self.deltas if self.deltas else 0.0

    @property
    def budget(self) -> dict[str, Any]:
        """The budget that the config states; counts by module are summed up."""
        return budget_of(self.adapter.config)

    @property
    def settings(self) -> dict[str, Any]:
        """The other settings of the config, as plain values."""
        values = {name: getattr(self.adapter.config, name) for name in _CONFIG_FIELDS}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def budget_of(config: SpIELConfig) -> dict[str, Any]:
    """The budget that a config states; counts by module are summed up."""
    name = next(name for name in ("r", "density", "num_deltas") if getattr(config, name) is not None)
    value = getattr(config, name)
    budget: dict[str, Any] = {name: value}
    if isinstance(value, dict):
        budget = {name: sum(value.values()), "by_module": True}
    patterns = {name: getattr(config, name) for name in ("rank_pattern", "density_pattern")}
    return budget | {name: pattern for name, pattern in patterns.items() if pattern}


def adapter_facts(folder: str | os.PathLike[str], base: Base | None = None) -> AdapterFacts:
    """Read an adapter and measure it.

    Args:
        folder: the adapter's folder.
        base: the model it is for, as `open_base` takes it; only shapes are read. Without it shapes are known for
            adapters that were saved in training, as matrices.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: the adapter is of another method, a tensor is damaged, or the base lacks a module or has a smaller
            weight there.
    """
    folder = Path(folder)
    adapter, state, path = read_with_state(folder)
    shapes = {module: matrix_shape(entries) for module, entries in state.items()}
    if base is not None:
        shapes = _base_shapes(adapter, open_base(base), str(path))
    bare = {name for name in adapter.deltas if adapter.config.names_parameter(name)}
    deltas = [(name, adapter.deltas[name]) for name in sorted(adapter.deltas, key=by_number)]
    modules = [_module_facts(name, delta, shapes.get(name), name in bare) for name, delta in deltas]
    return AdapterFacts(folder, adapter, modules, _progress(state), path.stat().st_size)


def by_number(module: str) -> list[tuple[int, str]]:
    """A key that sorts names of modules with the numbers in them as numbers: layer 2 before layer 10."""
    parts = re.split(r"([0-9]+)", module)
    return [(int(part), "") if place % 2 else (-1, part) for place, part in enumerate(parts)]


def read_with_state(folder: Path) -> tuple[AdapterFile, dict[str, dict[str, Tensor]], Path]:
    """An adapter, the training state in its file by module, and the path of that file. Raises as `read_adapter`."""
    adapter, path, tensors = read_whole_adapter(folder)
    return adapter, state_of(tensors), path


def state_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of the training state by module and name."""
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parts = split_file_key(key.removeprefix(PREFIX))
        if parts is not None and parts[1] in STATE_KEYS:
            state.setdefault(parts[0], {})[parts[1]] = tensor
    return state


def weight_name(config: SpIELConfig, module: str) -> str:
    """The parameter that a delta belongs to: the weight of a module, or one of `target_parameters` itself."""
    return module if config.names_parameter(module) else f"{module}.weight"


def matrix_shape(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Shape of the adapted weight, seen as a matrix, from a delta's training state; None if that does not say."""
    settings = state.get(SETTINGS)
    if settings is None or settings.dtype != torch.int64 or tuple(settings.shape) != (5,):
        return None
    rows, columns = settings[1:3].tolist()
    return (rows, columns) if rows > 0 and columns > 0 else None


def _base_shapes(adapter: AdapterFile, base: Checkpoint, where: str) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for module, delta in adapter.deltas.items():
        shape = base.shape(weight_name(adapter.config, module), where)
        if delta.k and int(delta.indices[-1]) >= math.prod(shape):
            raise ValueError(
                f"{where}: module {module!r} has positions up to {int(delta.indices[-1])}, but in {base.where} its "
                f"weight has shape {shape}; is it another model's?"
            )
        shapes[module] = shape
    return shapes


def rows_of(shape: tuple[int, ...], bare: bool) -> int:
    """Number of rows of a weight seen as a matrix; the matrices of a bare parameter are counted together."""
    return math.prod(shape[:-1]) if bare else shape[0]


def _module_facts(name: str, delta: StoredDelta, shape: tuple[int, ...] | None, bare: bool) -> ModuleFacts:
    values = delta.values.double()
    size = values.abs()
    return ModuleFacts(
        module=name,
        deltas=delta.k,
        shape=shape,
        rows=None if shape is None else rows_of(shape, bare),
        dtype=str(delta.values.dtype).removeprefix("torch."),
        norm=float(torch.linalg.vector_norm(values)),
        mean_abs=float(size.mean()) if delta.k else 0.0,
        max_abs=float(size.max()) if delta.k else 0.0,
        zeros=int((values == 0).sum()),
    )


def _progress(state: Mapping[str, Mapping[str, Tensor]]) -> Progress | None:
    for entries in state.values():
        tensor = entries.get(PROGRESS)
        if tensor is not None and tuple(tensor.shape) == (5,):
            step, closes, _, _, total = tensor.tolist()
            return Progress(int(step), int(closes), int(total))
    return None


@dataclass(frozen=True)
class Close:
    """One close of a cycle, as `SpIELCallback` logs it.

    Attributes:
        step: optimizer step after which the close took place.
        rate: share of the deltas that the schedule offered for replacement, 0 to 1.
        replaced, kept: numbers of deltas.
        churn: share of the deltas that moved, 0 to 1.
        mean_abs_delta: mean absolute delta before the close.
    """

    step: int
    rate: float
    replaced: int
    kept: int
    churn: float
    mean_abs_delta: float


@dataclass(frozen=True)
class Losses:
    """Losses by optimizer step: of the batches trained on, and of the evaluations."""

    train: dict[int, float]
    held_out: dict[int, float]


def find_log(folder: str | os.PathLike[str]) -> Path | None:
    """The log of the run that an adapter comes from: in its folder, in a trainer's checkpoint there, or one level up.

    Of several checkpoints the last one has the longest log.
    """
    folder = Path(folder)
    for place in (folder, folder.resolve().parent):
        for path in (place / TRAINER_STATE, *reversed(_checkpoints(place))):
            if _is_log(path):
                return path
    return None


def _checkpoints(folder: Path) -> list[Path]:
    found = [(_CHECKPOINT_NUMBER.search(path.name), path) for path in folder.glob("checkpoint-*")]
    return [path / TRAINER_STATE for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def _is_log(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        return bool(_closes(_load(path)))
    except ValueError:
        return False


def read_closes(log: str | os.PathLike[str]) -> list[Close]:
    """The closes in a ``trainer_state.json``, in the order of their steps.

    Args:
        log: the file, or a folder with one.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: the log cannot be read, or holds no close.
    """
    path = _path(log)
    closes = _closes(_load(path))
    if not closes:
        raise ValueError(f"{path} logs no close of a cycle; give SpIELCallback() to the Trainer to have them logged")
    return closes


def read_losses(log: str | os.PathLike[str]) -> Losses:
    """The losses in a ``trainer_state.json``. Arguments and errors are those of `read_closes`."""
    path = _path(log)
    entries = _history(_load(path))
    try:
        found = [{int(e["step"]): float(e[key]) for e in entries if key in e} for key in ("loss", "eval_loss")]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} logs a loss without a step or a number: {error}") from error
    if not found[0]:
        raise ValueError(f"{path} logs no training loss; set logging_steps of the Trainer to have it logged")
    return Losses(*found)


def _path(log: str | os.PathLike[str]) -> Path:
    path = Path(log)
    if path.is_dir():
        found = find_log(path)
        if found is None:
            raise FileNotFoundError(
                f"{path} has no log of closes ({TRAINER_STATE}); they are logged where SpIELCallback() was given to "
                "the Trainer"
            )
        path = found
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return path


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def _history(content: Any) -> list[dict[str, Any]]:
    history = content.get("log_history") if isinstance(content, dict) else None
    return [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []


def _closes(content: Any) -> list[Close]:
    entries = [entry for entry in _history(content) if "spiel/churn" in entry]
    rows = [{key.removeprefix("spiel/"): value for key, value in entry.items()} for entry in entries]
    try:
        closes = [Close(int(row["step"]), *(_number(row, name) for name in _CLOSE_FIELDS)) for row in rows]
    except (KeyError, TypeError, ValueError, OverflowError):
        return []
    return sorted(closes, key=lambda close: close.step)


def _number(row: dict[str, Any], name: str) -> Any:
    return int(row[name]) if name in ("replaced", "kept") else float(row[name])
