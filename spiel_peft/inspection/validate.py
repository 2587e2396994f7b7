"""Everything that is wrong with an adapter on disk, listed instead of stopping at the first problem."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor

from spiel_kernels import index_dtype

from ..adapter_format import (
    DELTA_KEYS,
    MARKER,
    NOT_FINITE,
    check_indices_and_values,
    check_training_state,
    not_finite,
    split_file_key,
)
from ..budget import allocate_deltas
from ..config import SpIELConfig, names_module
from ..files.adapter_file import (
    PREFIX,
    TOKENS,
    parents,
    read_config,
    read_tensors,
    tensors_file,
    trained_rows,
    unannounced,
)
from ..files.checkpoint import Base, Checkpoint, open_base
from ..state import RunSettings
from ..weights.base_weight import PARAMETER, BaseInfo
from .facts import matrix_shape, rows_of, weight_name

_DELTA = ("indices", "values")
Entries = Mapping[str, Tensor]


@dataclass(frozen=True)
class Finding:
    """One problem of an adapter.

    Attributes:
        file: the file at fault.
        tensor: the tensor, or the field of the config, at fault; None if the whole file is.
        problem: a phrase that continues the name.
    """

    file: str
    tensor: str | None
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}" if self.tensor is None else f"{self.file}: {self.tensor} {self.problem}"


def validate_adapter(folder: str | os.PathLike[str], base: Base | None = None) -> list[Finding]:
    """List the problems of an adapter; the list is empty if it is sound.

    Checked are every tensor (indices sorted, unique and not negative; values finite; as many of one as of the other;
    training state), and that the config's budget and targets are those of the tensors. With a base also that every
    module is there, that positions lie in its weight, and that budgets by rank or density give the number of deltas.

    Args:
        folder: the adapter's folder.
        base: the model it is for, as `open_base` takes it; only shapes are read.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the base cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    opened = None if base is None else open_base(base)
    config_file = str(folder / "adapter_config.json")
    findings: list[Finding] = []
    config, tensors = None, None
    path = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        config = read_config(folder)
    except (ValueError, FileNotFoundError) as error:
        findings.append(_of_error(config_file, error))
    try:
        path = tensors_file(folder) or path
        path, tensors = read_tensors(folder)
    except (ValueError, FileNotFoundError) as error:
        findings.append(_of_error(str(path), error))
    if config is not None and not isinstance(config, SpIELConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        return [*findings, Finding(config_file, "peft_type", f"is {kind!r}: it is not a SpIEL adapter")]
    if tensors is None:
        return findings
    modules, others, odd = _sorted_by_module(tensors)
    findings += [Finding(str(path), name, problem) for name, problem in odd]
    for module, entries in modules.items():
        problems = _delta_problems(module, entries, config, opened)
        findings += [Finding(str(path), f"{module}{MARKER}{name}", problem) for name, problem in problems]
    findings += [Finding(str(path), key, problem) for key, problem in _other_problems(others, config, modules, opened)]
    if config is not None:
        try:
            config.check_patterns(modules)
        except ValueError as error:
            return [*findings, _of_error(config_file, error)]
        counts = {module: entries["indices"].numel() for module, entries in modules.items() if "indices" in entries}
        problems = [*_config_problems(config, counts, others), *_budget_problems(config, counts, opened)]
        findings += [Finding(config_file, name, problem) for name, problem in problems]
    return findings


def _of_error(file: str, error: Exception) -> Finding:
    text = " ".join(str(error).split())
    return Finding(file, None, text.removeprefix(file).lstrip(": "))


def _sorted_by_module(
    tensors: Entries,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[tuple[str, str]]]:
    """Deltas with their training state by module, other tensors, and names that no adapter file has."""
    modules: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    odd: list[tuple[str, str]] = []
    for stored, tensor in tensors.items():
        key = stored.removeprefix(PREFIX)
        parts = split_file_key(key)
        if parts is None and MARKER in key:
            odd.append((key, "names an adapter; files hold '<module>.spiel_delta.indices' and '.values'"))
        elif parts is None:
            others[key] = tensor
        elif parts[1] in DELTA_KEYS:
            modules.setdefault(parts[0], {})[parts[1]] = tensor
        else:
            odd.append((key, "is not a tensor of a SpIEL delta"))
    return modules, others, odd


def _delta_problems(
    module: str, entries: Entries, config: SpIELConfig | None, base: Checkpoint | None
) -> Iterator[tuple[str, str]]:
    """Names and problems of the tensors of one module, training state included."""
    shape: tuple[int, ...] | None = matrix_shape(entries)
    if base is not None:
        name = base.find(f"{module}.weight" if config is None else weight_name(config, module))
        if name is None:
            yield "indices", f"are of a weight that {base.where} does not have"
        else:
            shape = base.shapes[name]
    if not set(_DELTA) & set(entries):
        yield next(iter(entries)), "is training state of a delta that is missing"
        return
    size = None if shape is None else math.prod(shape)
    sound = True
    for problem in _pair_problems(entries, size):
        sound = False
        yield problem
    if not sound:
        return
    if size is not None and entries["indices"].dtype != index_dtype(size):
        yield "indices", f"must have dtype {index_dtype(size)} for a weight of {size} entries"
    if shape is not None and config is not None:
        rows = rows_of(shape, config.names_parameter(module))
        k, c = entries["indices"].numel(), config
        own = RunSettings(k, (rows, size // rows), c.growth, c.regrow_every, c.accumulation_steps)
        problem = check_training_state(entries, own)
        if problem is not None:
            yield problem


def _pair_problems(entries: Entries, size: int | None) -> Iterator[tuple[str, str]]:
    """Problems of indices and values, of both if both are bad."""
    values = entries.get("values")
    problem = check_indices_and_values(entries, size)
    if problem is None:
        return
    yield problem
    if problem[0] == "indices" and values is not None and "indices" in entries:
        # Values are judged only beside sound indices: these are sound, and as many.
        stand_in = torch.arange(entries["indices"].numel())
        problem = check_indices_and_values({"indices": stand_in, "values": values}, None)
        if problem is not None:
            yield problem


def _other_problems(
    others: Entries, config: SpIELConfig | None, adapted: Iterable[str], base: Checkpoint | None
) -> Iterator[tuple[str, str]]:
    """Problems of the tensors that are saved in full."""
    deltas = [f"{module}{MARKER}values" for module in adapted]
    odd = set(unannounced([*others, *deltas], config, _embeddings(base))) if config is not None else set()
    for key, tensor in others.items():
        if not_finite({key: tensor}):
            yield key, NOT_FINITE
        if key in odd:
            yield key, "is in the file, but not in the config (modules_to_save, bias, trainable_token_indices)"
        elif key.endswith(TOKENS) and config is not None:
            problem = _token_problem(key.removesuffix(TOKENS), tensor, config, base)
            if problem is not None:
                yield key, problem


def _token_problem(module: str, tensor: Tensor, config: SpIELConfig, base: Checkpoint | None) -> str | None:
    """What is wrong with the rows of an embedding that were trained token by token, or None."""
    rows = trained_rows(config, module)
    if rows is None:
        return f"holds rows of {module!r}, which the config's trainable_token_indices does not name"
    if tuple(tensor.shape[:1]) != (len(rows),):
        return f"has shape {tuple(tensor.shape)}, but trainable_token_indices names {len(rows)} rows"
    name = None if base is None else base.find(f"{module}.weight")
    if base is None or (name is not None and max(rows) < base.shapes[name][0]):
        return None
    if name is None:
        return f"holds rows of a weight that {base.where} does not have"
    return f"holds row {max(rows)}, but the weight in {base.where} has {base.shapes[name][0]} rows"


def _embeddings(base: Checkpoint | None) -> list[set[str]] | None:
    """Names of the base's embeddings that PEFT knows, those of one weight together; None if there are none."""
    if base is None:
        return None
    known = [n for n in base.shapes if any(names_module(f"{owner}.weight", n) for owner in EMBEDDING_LAYER_NAMES)]
    groups = {frozenset(base.tie_group(name)) for name in known}
    return [{name.removesuffix(".weight") for name in group} for group in groups] or None


def _config_problems(config: SpIELConfig, counts: Mapping[str, int], others: Entries) -> Iterator[tuple[str, str]]:
    """Fields of the config that the tensors contradict, without a base."""
    if not counts:
        yield "target_modules", "selects modules, but the file holds no deltas"
    for owner in config.modules_to_save or ():
        if not any(names_module(owner, name) for key in others for name in parents(key)):
            yield "modules_to_save", f"has {owner!r}, but the file does not"
    # Tied modules share a delta. Files hold it under the names of both modules, configs under one.
    if not config.ensure_weight_tying:
        yield from _target_problems(config, list(counts))
    if isinstance(config.num_deltas, dict):
        for module, count in config.num_deltas.items():
            if module not in counts:
                yield "num_deltas", f"has {count} for {module!r}, but the file has no delta of it"
            elif counts[module] != count:
                yield "num_deltas", f"has {count} for {module!r}, but the file has {counts[module]}"


def _target_problems(config: SpIELConfig, modules: list[str]) -> Iterator[tuple[str, str]]:
    targets = config.target_modules
    parameters = {module for module in modules if config.names_parameter(module)}
    for target in config.target_parameters or ():
        if not any(names_module(target, parameter) for parameter in parameters):
            yield "target_parameters", f"has {target!r}, but the file has no delta of it"
    if targets is None or targets == "all-linear":
        return
    modules = [module for module in modules if module not in parameters]
    for module in modules:
        if not check_target_module_exists(config, module):
            yield "target_modules", f"does not select {module!r}, which the file has a delta of"
    if not isinstance(targets, str) and not isinstance(config.num_deltas, dict):
        for target in sorted(targets):
            if not any(names_module(target, module) for module in modules):
                yield "target_modules", f"has {target!r}, but the file has no delta of it"


def _info(config: SpIELConfig, module: str, base: Checkpoint) -> BaseInfo | None:
    if not config.names_parameter(module):
        return base.info(module)
    name = base.find(module)
    if name is None:
        return None
    shape = base.shapes[name]
    if len(shape) == 1:
        return BaseInfo(PARAMETER, shape, 1, shape[0], None)
    return BaseInfo(PARAMETER, shape, shape[-1], shape[-2], None, experts=math.prod(shape[:-2]))


def _budget_problems(
    config: SpIELConfig, counts: Mapping[str, int], base: Checkpoint | None
) -> Iterator[tuple[str, str]]:
    """Where the budget and the base's shapes give another number of deltas than the file has."""
    if base is None or isinstance(config.num_deltas, dict):
        return
    if config.num_deltas is not None and config.ensure_weight_tying:
        return
    infos = {module: info for module in counts if (info := _info(config, module, base)) is not None}
    if config.num_deltas is not None and len(infos) < len(counts):
        return
    name = "density" if config.density is not None else "r" if config.r is not None else "num_deltas"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights smaller than the budget
            wanted = allocate_deltas(config, infos)
    except ValueError as error:
        yield name, f"does not fit the file: {' '.join(str(error).split())}"
        return
    for module, count in wanted.items():
        if counts[module] != count:
            yield (
                name,
                f"gives {module!r}, whose weight in {base.where} has shape {infos[module].weight_shape}, {count} "
                f"deltas; the file has {counts[module]}",
            )
