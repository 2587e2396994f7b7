"""Extracts the sparse adapter that lies between two checkpoints: the largest changes (lottery-ticket selection)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor

from spiel_kernels import index_dtype

from ..adapter_format import MARKER
from ..budget import allocate_deltas
from ..card import facts_of_counts, update_card
from ..config import SpIELConfig
from ..weights.base_weight import BaseInfo
from .adapter_file import PREFIX, AdapterFile, StoredDelta
from .checkpoint import Checkpoint, Source, open_checkpoint
from .differences import (
    Difference,
    SmallTensors,
    Targets,
    adaptable_modules,
    compare,
    find_small_tensors,
    find_targets,
)
from .folder import refuse_existing, refuse_inputs, whole_folder
from .tensors import PIECE_BYTES, Progress, SafetensorsWriter, TensorSpec


@dataclass
class Extraction:
    """The result of `extract_delta`.

    Attributes:
        counts: number of deltas by module; modules without a change are left out.
        kept: share of the squared change of the compared weights that the deltas hold, 0 to 1; 1 if nothing changed.
        left_out: parameters that changed and are not in the adapter, with the reason.
        adapter: the adapter, unless it was written to a folder.
        folder: the adapter's folder, if it was written.
    """

    counts: dict[str, int]
    kept: float
    left_out: dict[str, str] = field(default_factory=dict)
    adapter: AdapterFile | None = None
    folder: Path | None = None


def extract_delta(
    base: Source,
    finetuned: Source,
    out_dir: str | os.PathLike[str] | None = None,
    *,
    density: float | None = None,
    num_deltas: int | dict[str, int] | None = None,
    r: int | None = None,
    scope: Literal["module", "global"] = "module",
    target_modules: Targets = None,
    exclude_modules: Targets = None,
    rewind: bool = False,
    norms_and_biases: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Extraction:
    """Make a SpIEL adapter of the largest changes between two checkpoints.

    Memory beyond the result: a few pieces of 16 MiB; with `out_dir` the result does not have to fit either. Files are
    read up to three times.

    Args:
        base, finetuned: folders (safetensors or ``.bin``, sharded or not), weight files, state dicts or models.
        out_dir: write the adapter there; None: return it in memory.
        density, num_deltas, r: the budget, exactly one, as in `SpIELConfig`. Changes of exactly zero take no part, so
            fewer deltas may come out.
        scope: "module": each weight keeps its own largest changes; "global": the budget goes to the largest changes
            wherever they are.
        target_modules: names or name suffixes, a regex, or "all-linear"; None: every weight that SpIEL can adapt,
            embeddings and output layer included. exclude_modules: names, name suffixes or a regex to leave alone.
        rewind: keep the positions and set every value to zero, to be trained anew with ``growth="none"``, which the
            config then says.
        norms_and_biases: save changed norms (``modules_to_save``) and biases (``bias="all"``) with the adapter, in
            full; with `rewind` as the base has them. Else they are listed in `Extraction.left_out`.
        overwrite: replace what is at `out_dir`.
        progress: called with entries read, entries to read and the parameter at hand.

    Raises:
        ValueError: the budget or a target is wrong, or a tensor is missing, of another shape, quantized or not finite.
        FileNotFoundError: a folder, file or shard is missing.
        FileExistsError: there is something at `out_dir`.

    After any error nothing has been written.
    """
    _check_request(density, num_deltas, r, scope)
    if out_dir is not None:
        refuse_inputs(out_dir, {"base": base, "finetuned": finetuned})
        refuse_existing(out_dir, overwrite)
    before, after = _open_pair(base, finetuned)
    if isinstance(num_deltas, dict) and target_modules is None:
        target_modules = set(num_deltas)
    infos = find_targets(before, target_modules, exclude_modules)
    _take_in_untied(infos, before, after)
    budget = SpIELConfig(density=density, num_deltas=num_deltas, r=r, target_modules=sorted(infos))
    adaptable, _ = adaptable_modules(before)
    small = find_small_tensors(before, after, infos, {*adaptable, *infos}, norms_and_biases, rewind)
    pairs = {module: compare(before, after, f"{module}.weight") for module in infos}
    search = _Search(pairs, infos, allocate_deltas(budget, infos), scope, rewind, progress)
    with _result(out_dir, overwrite) as (spool, work):
        result = Extraction(search.found, search.run(spool), small.left_out)
        if not search.found:
            raise ValueError(f"{before.where} and {after.where} do not differ in any of the weights compared")
        config = _config(search.found, before, after, small, rewind)
        copies = tied_copies(search.found, before, after)
        if isinstance(spool, DiskSpool):
            spool.write(config, small.tensors, copies, work)
            result.folder = Path(out_dir)
        else:
            held = spool.deltas()
            held.update({copy: held[owner] for copy, owner in copies.items()})
            result.adapter = AdapterFile(config, held, small.tensors)
    return result


def _check_request(density: float | None, num_deltas: int | dict[str, int] | None, r: int | None, scope: str) -> None:
    if scope not in ("module", "global"):
        raise ValueError(f"scope must be 'module' or 'global', got {scope!r}")
    if (density, num_deltas, r).count(None) != 2:
        raise ValueError("give exactly one of density, num_deltas and r: how many changes to keep")


def _open_pair(base: Source, finetuned: Source) -> tuple[Checkpoint, Checkpoint]:
    before, after = open_checkpoint(base, "base"), open_checkpoint(finetuned, "finetuned")
    names = before.names or after.names
    before.use_names(names)
    after.use_names(names)
    return before, after


def _take_in_untied(infos: dict[str, BaseInfo], before: Checkpoint, after: Checkpoint) -> None:
    """Add the weights that are tied in the base only to the weights to compare, if their owners are among these."""
    for parameter, owner in before.tied.items():
        module, of = parameter.removesuffix(".weight"), owner.removesuffix(".weight")
        if parameter not in after.tied and of in infos and parameter in after.stored:
            infos[module] = infos[of]


def tied_copies(found: dict[str, int], before: Checkpoint, after: Checkpoint) -> dict[str, str]:
    """By module: the module with deltas that it is tied to in both checkpoints. Adapter files name both modules."""
    return {
        name.removesuffix(".weight"): owner.removesuffix(".weight")
        for name, owner in before.tied.items()
        if name in after.tied and owner.removesuffix(".weight") in found and name.endswith(".weight")
    }


@contextmanager
def _result(
    out_dir: str | os.PathLike[str] | None, overwrite: bool
) -> Iterator[tuple[DiskSpool | MemorySpool, Path | None]]:
    if out_dir is None:
        yield MemorySpool(), None
        return
    with whole_folder(out_dir, overwrite) as work, TemporaryDirectory(dir=work) as scratch:
        yield DiskSpool(Path(scratch)), work


class _Search:
    """Finds the largest changes in several passes over all differences."""

    def __init__(
        self,
        pairs: dict[str, Difference],
        infos: dict[str, BaseInfo],
        counts: dict[str, int],
        scope: str,
        rewind: bool,
        progress: Progress | None,
    ) -> None:
        self.pairs, self.infos, self.counts = pairs, infos, counts
        self.scope, self.rewind, self.progress = scope, rewind, progress
        self.found: dict[str, int] = {}
        self._read = 0
        # Two passes find the cut, and one takes the changes above it.
        self._total = 3 * sum(pair.numel for pair in pairs.values())
        self._squares = [0.0, 0.0]  # sums of squared changes: of the chosen entries, of all

    def run(self, spool: DiskSpool | MemorySpool) -> float:
        """Put the largest changes into the spool. Returns their share of the squared change of all entries."""
        if self.scope == "global":
            cut = self._cut(list(self.pairs), sum(self.counts.values()))
            cuts = dict.fromkeys(self.pairs, cut)
        for module in self.pairs:
            self._take(module, cuts[module] if self.scope == "global" else self._cut([module]), spool)
        if self.progress is not None and self._read < self._total:
            self.progress(self._total, self._total, "done")
        kept, whole = self._squares
        return kept / whole if whole else 1.0

    def _cut(self, modules: list[str], k: int | None = None) -> Cut:
        k = self.counts[modules[0]] if k is None else k
        numel = sum(self.pairs[module].numel for module in modules)
        if k >= numel:
            self._read += 2 * numel
            return find_cut(lambda: [], None)
        return find_cut(lambda: (change.abs_() for module in modules for _, change in self._pieces(module)), k)

    def _take(self, module: str, cut: Cut, spool: DiskSpool | MemorySpool) -> None:
        dtype = index_dtype(self.infos[module].numel)
        for start, change in self._pieces(module):
            slots = cut.choose(change.abs())
            values = change[slots]
            self._squares[0] += float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
            self._squares[1] += float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
            if slots.numel():
                self.found[module] = self.found.get(module, 0) + slots.numel()
                spool.add(module, (slots + start).to(dtype), torch.zeros_like(values) if self.rewind else values)

    def _pieces(self, module: str) -> Iterator[tuple[int, Tensor]]:
        for start, change in self.pairs[module].pieces():
            yield start, change
            self._read += change.numel()
            if self.progress is not None:
                self.progress(min(self._read, self._total), self._total, module)


def _config(
    found: dict[str, int], before: Checkpoint, after: Checkpoint, small: SmallTensors, rewind: bool
) -> SpIELConfig:
    architecture = type(before.names.model).__name__ if before.names is not None else ""
    tasks = {"ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    copies = tied_copies(found, before, after)
    # PEFT ties by these names only; other tied modules get deltas of their own, which start out equal.
    tying = any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in copies.values())
    counts = dict(found) if tying else {**found, **{copy: found[owner] for copy, owner in copies.items()}}
    return SpIELConfig(
        num_deltas=counts,
        task_type=next((task for ending, task in tasks.items() if architecture.endswith(ending)), None),
        base_model_name_or_path=before.where if before.files else None,
        ensure_weight_tying=tying,
        modules_to_save=sorted(small.modules) or None,
        bias="all" if small.has_biases else "none",
        delta_dtype="float32",
        growth="none" if rewind else "accumulated_gradient",
        inference_mode=not rewind,
    )


class MemorySpool:
    """Collects the deltas of an extraction in memory, piece by piece."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, module: str, indices: Tensor, values: Tensor) -> None:
        """Append ``[n]`` indices and their values to a module's delta."""
        self._pieces.setdefault(module, []).append((indices, values))

    def deltas(self) -> dict[str, StoredDelta]:
        return {
            module: StoredDelta(torch.cat([i for i, _ in pieces]), torch.cat([v for _, v in pieces]))
            for module, pieces in self._pieces.items()
        }


class DiskSpool:
    """Collects the deltas of an extraction in files, piece by piece, until their number is known.

    Args:
        folder: for the files, one per module and kind of tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, tuple[int, int, torch.dtype]] = {}  # number in file names, entries, dtype of indices

    def add(self, module: str, indices: Tensor, values: Tensor) -> None:
        """Append ``[n]`` indices and their float32 values to a module's delta."""
        number, count, _ = self._found.get(module, (len(self._found), 0, None))
        self._found[module] = (number, count + indices.numel(), indices.dtype)
        for name, tensor in (("indices", indices), ("values", values)):
            with open(self._path(number, name), "ab") as file:
                file.write(memoryview(tensor.contiguous().numpy()).cast("B"))

    def write(self, config: SpIELConfig, others: dict[str, Tensor], copies: dict[str, str], folder: Path) -> None:
        """Write the adapter folder.

        Args:
            config: of the adapter.
            others: tensors besides the deltas, by key.
            copies: modules that have the same delta as another module, with the name of that one.
            folder: where to write; it exists.
        """
        found = {**self._found, **{module: self._found[owner] for module, owner in copies.items()}}
        specs = {PREFIX + key: TensorSpec.of(tensor.dtype, tuple(tensor.shape)) for key, tensor in others.items()}
        for module, (_, count, dtype) in found.items():
            specs[f"{PREFIX}{module}{MARKER}indices"] = TensorSpec.of(dtype, (count,))
            specs[f"{PREFIX}{module}{MARKER}values"] = TensorSpec.of(torch.float32, (count,))
        with SafetensorsWriter(folder / SAFETENSORS_WEIGHTS_NAME, specs) as writer:
            for key, tensor in others.items():
                writer.write(PREFIX + key, 0, tensor.flatten())
            for module, (number, _, _) in found.items():
                for name in ("indices", "values"):
                    self._copy(self._path(number, name), writer, f"{PREFIX}{module}{MARKER}{name}")
        config.save_pretrained(str(folder))
        update_card(folder, [facts_of_counts(config, {module: count for module, (_, count, _) in found.items()})])

    def _path(self, number: int, name: str) -> Path:
        return self.folder / f"{number}.{name}"

    @staticmethod
    def _copy(path: Path, writer: SafetensorsWriter, key: str) -> None:
        start = 0
        with open(path, "rb") as file:
            while data := file.read(PIECE_BYTES):
                writer.write_bytes(key, start, memoryview(data))
                start += len(data)


# A float32's magnitude, read as an integer, ranks as the float does; half of its bits per pass.
_HALF = 16
_BUCKETS = 1 << _HALF


@dataclass
class Cut:
    """Which magnitudes belong to the k largest: all above a bound, and the first few of those equal to it.

    Attributes:
        bound: a magnitude, as the bits of its float32.
        ties: how many of the magnitudes equal to the bound still belong; `choose` takes the first ones it meets.
    """

    bound: int
    ties: int

    def choose(self, magnitudes: Tensor) -> Tensor:
        """Ascending int64 slots of the k largest in a piece of float32 magnitudes ``[n]``. Call in order."""
        bits = magnitudes.view(torch.int32)
        chosen = bits > self.bound
        if self.ties:
            equal = (bits == self.bound).nonzero().flatten()[: self.ties]
            self.ties -= equal.numel()
            chosen[equal] = True
        return chosen.nonzero().flatten()


def find_cut(pieces: Callable[[], Iterable[Tensor]], k: int | None) -> Cut:
    """Find the k largest magnitudes, zeros left out; ties go to the earliest.

    Args:
        pieces: returns the magnitudes, in pieces of float32 ``[n]``, not negative and finite; called up to twice.
        k: how many magnitudes to find, at least 1; None for all.
    """
    if k is None:
        return Cut(0, 0)
    counts = torch.zeros(_BUCKETS, dtype=torch.int64)
    for piece in pieces():
        counts += torch.bincount(piece.view(torch.int32) >> _HALF, minlength=_BUCKETS)
    high, above = _bucket_of(counts, k)
    if high < 0:
        return Cut(0, 0)
    counts.zero_()
    for piece in pieces():
        bits = piece.view(torch.int32)
        counts += torch.bincount(bits[(bits >> _HALF) == high] & (_BUCKETS - 1), minlength=_BUCKETS)
    if high == 0:
        counts[0] = 0  # zeros
    low, more = _bucket_of(counts, k - above)
    if low < 0:
        return Cut(0, 0)
    return Cut((high << _HALF) | low, k - above - more)


def _bucket_of(counts: Tensor, k: int) -> tuple[int, int]:
    """The bucket of the k-th largest entry (-1: there are fewer), and the number of entries in the buckets above."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, k))
    if position == counts.numel():
        return -1, int(from_top[-1])
    above = int(from_top[position - 1]) if position else 0
    return counts.numel() - 1 - position, above
