"""The sparse adapter that lies between two checkpoints: the largest changes (lottery-ticket selection)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor

from spiel_kernels import index_dtype

from ..base_weight import BaseInfo
from ..budget import allocate_deltas
from ..config import SpIELConfig
from .adapter_file import AdapterFile
from .atomic import refuse_existing, whole_folder
from .differences import Difference, Targets, adaptable_modules, compare, find_targets
from .largest import Cut, find_cut
from .small_tensors import SmallTensors, find_small_tensors
from .spool import DiskSpool, MemorySpool
from .weights import Checkpoint, Source, open_checkpoint

Progress = Callable[[int, int, str], None]


@dataclass
class Extraction:
    """What `extract_delta` found.

    Attributes:
        counts: number of deltas by module; modules without a change are not in it.
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
        ValueError: the budget, a target, or a tensor that is missing, of another shape, quantized or not finite.
        FileNotFoundError, FileExistsError: as they say. Nothing has been written then.
    """
    _check_request(density, num_deltas, r, scope)
    if out_dir is not None:
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
    """A weight that is tied in the base only, and whose owner is compared, is compared by itself as well."""
    for parameter, owner in before.tied.items():
        module, of = parameter.removesuffix(".weight"), owner.removesuffix(".weight")
        if parameter not in after.tied and of in infos and parameter in after.stored:
            infos[module] = infos[of]


def tied_copies(found: dict[str, int], before: Checkpoint, after: Checkpoint) -> dict[str, str]:
    """Modules that are tied to one with deltas in both checkpoints, and that one: adapter files name both."""
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
    """The passes over all differences."""

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
        # Two passes to find the cut, one to take what is above it.
        self._total = 3 * sum(pair.numel for pair in pairs.values())
        self._squares = [0.0, 0.0]

    def run(self, spool: DiskSpool | MemorySpool) -> float:
        """Fill the spool; returns the share of the squared change that it holds."""
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
