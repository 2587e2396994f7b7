"""Merges adapters into a checkpoint on disk, tensor by tensor: into its weights, or into their dequantized values."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spiel_kernels import write_entries
from spiel_kernels.quantized_layout import NestedScales, Packed4bit, dequantize_4bit, dequantize_8bit

from ..budget import allocate_deltas
from ..checks import json_object
from ..weights.merge_report import MERGE_IN_FLOAT32, MergeLoss, MergeReport, count_lost, log_loss
from .adapter_file import AdapterFile, parameter_of_key, read_adapter
from .checkpoint import INDEX_SUFFIX, SINGLE_FILES, Checkpoint, open_checkpoint, safetensors_name
from .edits import Edit, config_changes, read_edits, settle_ties, split_fused
from .folder import copy_other_files, edit_config, refuse_existing, refuse_inputs, whole_folder
from .model_names import names_with_head
from .tensors import PIECE_BYTES, FileTensor, MemoryTensor, Progress, SafetensorsWriter, StoredTensor, TensorSpec

Path_ = str | os.PathLike[str]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# Entries of a piece, of up to 8 bytes: sums are float32, and lost deltas are counted in float64.
_ENTRIES = PIECE_BYTES // 8


@dataclass(frozen=True)
class _Output:
    """One tensor of the merged checkpoint: its name, the tensor it is made of, its edit, and its dtype."""

    key: str
    source: StoredTensor
    edit: Edit | None
    dtype: torch.dtype | None

    @property
    def is_plain_copy(self) -> bool:
        return self.edit is None and self.dtype == self.source.dtype and isinstance(self.source, FileTensor)

    @property
    def spec(self) -> TensorSpec:
        return self.source.spec if self.is_plain_copy else TensorSpec.of(self.dtype, self.source.shape)


def merge_adapter_into_checkpoint(
    base_dir: Path_,
    adapter_dir: Path_ | Sequence[Path_],
    out_dir: Path_,
    dtype: torch.dtype | str | None = None,
    *,
    weights: Sequence[float] | None = None,
    quantization_config: Any = None,
    load_dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write a copy of a model's folder with adapters merged into its weights, on the CPU, whole or not at all.

    Every changed weight is the float32 sum of what the base stores and all deltas, rounded once to the dtype it is
    stored in. The result loads without this package. Peak memory: a few pieces of 16 MiB and the adapters; with
    `quantization_config`, besides, a few times the largest matrix.

    Args:
        base_dir: the full-precision checkpoint: ``config.json`` and safetensors or ``.bin`` files, sharded or not.
        adapter_dir: an adapter's folder, or several, whose deltas add up.
        out_dir: the folder to make.
        dtype: store all floating tensors in "float32", "bfloat16" or "float16"; None: each as in the base.
        weights: a factor for each adapter's deltas, 1 by default.
        quantization_config: the ``BitsAndBytesConfig`` the adapter was trained under: merge into the dequantized
            weights, which training saw, instead of the original ones.
        load_dtype: the dtype the model was loaded in before it was quantized; None: that of the checkpoint.
        overwrite: replace what is at `out_dir`.
        progress: called with entries written, entries to write and the tensor at hand.

    Returns:
        Counts of deltas that rounding has lost, and what was untied; a notable loss is logged too.

    Raises:
        FileNotFoundError: a folder, file or shard is missing.
        FileExistsError: there is something at `out_dir`.
        ValueError: a file is damaged, the base is quantized, the adapter is for another base or method, or a result
            is not finite; the message names file and tensor.
        OSError: the disk is full.

    After any error `out_dir` is as it was before.
    """
    base_dir, out_dir = Path(base_dir), Path(out_dir)
    folders = [Path(adapter_dir)] if isinstance(adapter_dir, (str, os.PathLike)) else [Path(f) for f in adapter_dir]
    wanted, loaded = _dtype("dtype", dtype), _dtype("load_dtype", load_dtype)
    _check_folders(base_dir, folders, out_dir, overwrite)
    factors = _factors(weights, len(folders))
    adapters = [(str(folder), read_adapter(folder)) for folder in folders]
    base = open_checkpoint(base_dir, "base_dir")
    changes = _add_head(base, [adapter for _, adapter in adapters])
    for where, adapter in adapters:
        _check_counts(where, adapter, base)
    edits = read_edits(adapters, factors, base)
    split_fused(edits, base)
    untied = settle_ties(edits, base)
    changes.update(config_changes(edits, untied, base))
    merge = _Merge(base, edits, untied, wanted)
    if quantization_config is not None:
        merge.dequantize(quantization_config, loaded)
    with whole_folder(out_dir, overwrite) as work:
        copy_other_files(base_dir, folders[0], work)
        edit_config(work, changes, str(wanted).removeprefix("torch.") if wanted else None)
        merge.write(work, progress)
    report = MergeReport(out_dir, merge.loss, merge.losses, merge.dtypes, untied)
    log_loss(report.loss, " and ".join(sorted(report.dtypes)), MERGE_IN_FLOAT32)
    return report


def _dtype(name: str, value: torch.dtype | str | None) -> torch.dtype | None:
    found = _DTYPES.get(str(value).removeprefix("torch."))
    if value is not None and found is None:
        raise ValueError(f"{name} must be one of {', '.join(_DTYPES)} or None, got {value!r}")
    return found


def _check_folders(base: Path, adapters: Sequence[Path], out: Path, overwrite: bool) -> None:
    if not adapters:
        raise ValueError("adapter_dir names no adapter")
    if not base.is_dir():
        raise FileNotFoundError(f"base_dir: {base} is not a folder; huggingface_hub's snapshot_download makes one")
    refuse_existing(out, overwrite)
    refuse_inputs(out, {"base_dir": base, "adapter_dir": adapters})


def _factors(weights: Sequence[float] | None, count: int) -> list[float]:
    factors = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(factors) != count:
        raise ValueError(f"weights has {len(factors)} entries for {count} adapters; give one for each")
    if not all(torch.isfinite(torch.tensor(factors))):
        raise ValueError(f"weights must be finite, got {factors}")
    return factors


def _add_head(base: Checkpoint, adapters: Sequence[AdapterFile]) -> dict[str, Any]:
    """Give the base's model the head that an adapter brings. Returns the fields of ``config.json`` for it."""
    for adapter in adapters:
        others = adapter.others.items()
        full = {parameter_of_key(key): tensor.shape for key, tensor in others if "_adapter." not in key}
        if base.names is None or all(base.names.find(name) for name in full):
            continue
        found = names_with_head(Path(base.where), adapter.config.task_type, full)
        if found is not None:
            base.use_names(found[0], keep_ties=False)
            return found[1]
    return {}


def _check_counts(where: str, adapter: AdapterFile, base: Checkpoint) -> None:
    """Refuse an adapter whose budget gives another number of deltas for the base's weights than its file holds.

    Adapter files have no shapes; with a budget of `r` or `density` the number of deltas tells the size of the weight.
    """
    config = adapter.config
    if base.names is None or config.num_deltas is not None:
        return
    infos = {module: info for module in adapter.deltas if (info := base.info(module)) is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training has given the warnings about the budget
        counts = allocate_deltas(config, infos)
    for module, count in counts.items():
        if adapter.deltas[module].k != count:
            raise ValueError(
                f"{where}: delta of {module!r} has {adapter.deltas[module].k} values, but the adapter's budget gives a "
                f"weight of shape {infos[module].weight_shape}, as {base.where} has it, {count}; it is for another base"
            )


class _Merge:
    """Plans the tensors of every file of the merged checkpoint, and writes the files."""

    def __init__(
        self, base: Checkpoint, edits: dict[str, Edit], untied: Sequence[str], dtype: torch.dtype | None
    ) -> None:
        self.base, self.dtype = base, dtype
        self.losses: dict[str, MergeLoss] = {}
        self.loss = MergeLoss()
        self.dtypes: set[str] = set()
        parameters = {key: parameter for parameter, key in base.stored.items()}
        file_of = {key: file for file, keys in base.files.items() for key in keys}
        last = next(reversed(base.files))
        self.files: dict[str, list[_Output]] = {file: [] for file in base.files}
        self.parameters: dict[str, str] = {}
        for key, source in base.tensors.items():
            parameter = parameters.get(key) or base.copies.get(key, "")
            edit = edits.get(parameter)
            if key in base.copies and parameter not in untied:
                edit = edits.get(base.owner(parameter))
            self._add(file_of[key], key, parameter, source, edit)
        for parameter in {*edits, *untied} - set(self.parameters.values()):
            owner = base.owner(parameter)
            file = file_of[base.stored[owner]] if owner is not None else last
            self._add(file, parameter, parameter, base.get(parameter), edits.get(parameter))

    def _add(self, file: str, key: str, parameter: str, stored: StoredTensor | None, edit: Edit | None) -> None:
        source = stored
        if edit is not None:
            if stored is None and edit.replacement is None:
                raise ValueError(f"{edit.source} has no place in {self.base.where}: no file of it holds {parameter}")
            edit.check(stored)
            if edit.replacement is not None:
                source = MemoryTensor(edit.replacement, edit.source)
            elif source.dtype is None or not source.dtype.is_floating_point or source.dtype.itemsize < 2:
                raise ValueError(
                    f"{parameter} in {source.where} has dtype {source.dtype}: give the unquantized weights"
                )
        floating = source.dtype is not None and source.dtype.is_floating_point and source.dtype.itemsize > 1
        # A tensor that an adapter brings is stored in the dtype of the one it replaces.
        own = stored.dtype if stored is not None and floating else source.dtype
        self.parameters[key] = parameter
        self.files[file].append(_Output(key, source, edit, self.dtype if self.dtype and floating else own))

    def dequantize(self, config: Any, load_dtype: torch.dtype | None) -> None:
        """Merge into dequantized values, not the stored ones, in all layers that were quantized in training."""
        check_quantization(config, self.base)
        parameters = quantized_parameters(self.base, config)
        for outputs in self.files.values():
            for number, out in enumerate(outputs):
                if self.parameters[out.key] in parameters and not isinstance(out.source, MemoryTensor):
                    source = DequantizedTensor(out.source, config, load_dtype or out.source.dtype)
                    outputs[number] = _Output(out.key, source, out.edit, out.dtype)

    def write(self, folder: Path, progress: Progress | None) -> None:
        """Write all weight files and, if there are several, their index."""
        total = sum(out.source.numel for outputs in self.files.values() for out in outputs)
        done, nbytes = 0, 0
        weight_map: dict[str, str] = {}
        for file, outputs in self.files.items():
            name = safetensors_name(file)
            with SafetensorsWriter(folder / name, {out.key: out.spec for out in outputs}) as writer:
                for out in outputs:
                    self._write_tensor(writer, out)
                    done += out.source.numel
                    if progress is not None:
                        progress(done, total, out.key)
            nbytes += writer.nbytes
            weight_map.update({out.key: name for out in outputs})
        if list(weight_map.values()) != [SINGLE_FILES[0]] * len(weight_map):
            self._write_index(folder, weight_map, nbytes, total)

    def _write_index(self, folder: Path, weight_map: dict[str, str], nbytes: int, total: int) -> None:
        metadata: dict[str, Any] = {"total_size": nbytes}
        for single in SINGLE_FILES:
            old = Path(self.base.where) / (single + INDEX_SUFFIX)
            if old.is_file() and "total_parameters" in (json_object(old).get("metadata") or {}):
                metadata["total_parameters"] = total
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (folder / (SINGLE_FILES[0] + INDEX_SUFFIX)).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write_tensor(self, writer: SafetensorsWriter, out: _Output) -> None:
        if out.is_plain_copy:
            size = out.spec.nbytes
            for start in range(0, size, PIECE_BYTES):
                writer.write_bytes(out.key, start, out.source.read_bytes(start, min(start + PIECE_BYTES, size)))
            return
        width = out.source.shape[-1] if out.source.shape else 1
        for start, stop in out.source.pieces(_ENTRIES):
            piece = out.source.read(start, stop)
            if out.edit is None:
                writer.write(out.key, start, piece.to(out.dtype))
                continue
            piece, positions, sums = out.edit.apply(piece, start, width, out.dtype)
            writer.write(out.key, start, self._merged(out, piece, positions, sums))

    def _merged(self, out: _Output, piece: Tensor, positions: Tensor, sums: Tensor) -> Tensor:
        before, rounded = piece.take(positions), sums.to(out.dtype)
        bad = ~torch.isfinite(rounded) & torch.isfinite(before)
        if bool(bad.any()):
            raise ValueError(
                f"{out.edit.source}: merged into {out.key} as {out.dtype}, {int(bad.sum())} weights are not finite; "
                'the adapter is broken, or dtype="float32" is needed'
            )
        plain = piece.to(out.dtype, copy=True)
        if positions.numel():
            loss = count_lost(before, sums, rounded, plain.take(positions))
            module = self.parameters[out.key].removesuffix(".weight")
            self.losses.setdefault(module, MergeLoss()).__iadd__(loss)
            self.loss += loss
            self.dtypes.add(str(out.dtype).removeprefix("torch."))
        return write_entries(plain, positions, rounded)


class DequantizedTensor(StoredTensor):
    """A full-precision matrix that is read as training on a quantized base saw it: quantized and dequantized.

    The first read converts the whole matrix, which is kept until the last piece is read.

    Args:
        stored: the full-precision matrix.
        config: transformers' ``BitsAndBytesConfig``.
        dtype: the dtype in which the model was loaded before it was quantized.
    """

    def __init__(self, stored: StoredTensor, config: Any, dtype: torch.dtype) -> None:
        super().__init__(stored.shape, dtype, stored.where)
        self.stored = stored
        self.config = config
        self._held: Tensor | None = None

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        if self._held is None:
            weight = self.stored.read().view(self.shape).to(self.dtype)
            self._held = _round_trip(weight, self.config).to(self.dtype).flatten()
        piece = self._held[start:stop].clone()
        if stop is None or stop == self.numel:
            self._held = None
        return piece


def _round_trip(weight: Tensor, config: Any) -> Tensor:
    """Quantize a matrix and dequantize it again."""
    from bitsandbytes import functional

    if config.load_in_8bit:
        packed, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return dequantize_8bit(packed, scales)
    packed, state = functional.quantize_4bit(
        weight, compress_statistics=config.bnb_4bit_use_double_quant, quant_type=config.bnb_4bit_quant_type
    )
    nested = None
    if state.nested:
        nested = NestedScales(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    shape = (weight.shape[0], weight.shape[1])
    return dequantize_4bit(
        Packed4bit(packed, state.absmax, shape, weight.dtype, state.quant_type, state.blocksize, nested)
    )


def check_quantization(config: Any, base: Checkpoint) -> None:
    """Check that `config` can be applied to the base.

    Raises:
        ValueError: `config` is no 4- or 8-bit ``BitsAndBytesConfig``, or the base's model is not known.
        ImportError: bitsandbytes is not installed.
    """
    if not (getattr(config, "load_in_4bit", False) or getattr(config, "load_in_8bit", False)):
        raise ValueError(
            "quantization_config must be a transformers.BitsAndBytesConfig with load_in_4bit or load_in_8bit, as the "
            f"model was loaded with in training; got {type(config).__name__}"
        )
    if base.names is None:
        raise ValueError(
            f"{base.where} has no config.json of a model that transformers knows, so which layers were quantized "
            "cannot be told; leave quantization_config out"
        )
    import bitsandbytes  # noqa: F401


def quantized_parameters(base: Checkpoint, config: Any) -> set[str]:
    """The weights that transformers quantizes when it loads this model with this config.

    Raises:
        ValueError: one of them is stored transposed, so that its quantized form has other positions.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = base.names.model
    skipped = HfQuantizer.get_modules_to_not_convert(
        model, config.llm_int8_skip_modules, getattr(model, "_keep_in_fp32_modules", None)
    )
    parameters = set()
    for name, module in base.names.modules.items():
        if not should_convert_module(name, skipped):
            continue
        if isinstance(module, Conv1D):
            raise ValueError(
                f"{name} is a transposed layer (Conv1D), which bitsandbytes quantizes the other way round: positions "
                "in it mean something else; leave quantization_config out only if training was not quantized"
            )
        if type(module) is nn.Linear:
            parameters.add(f"{name}.weight")
    return parameters
