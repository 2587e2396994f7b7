"""The sparse adapter that lies between two checkpoints: the largest changes, and small tensors that go in full."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor

from spiel_kernels import index_dtype

from ..budget import allocate_deltas
from ..config import SpIELConfig
from ..weights.base_weight import BaseInfo
from .adapter_file import AdapterFile
from .checkpoint import Checkpoint, Source, open_checkpoint
from .differences import Difference, Targets, adaptable_modules, compare, find_targets
from .edits import DiskSpool, MemorySpool
from .folder import Cut, find_cut, refuse_existing, whole_folder
from .tensors import StoredTensor

# The sparse adapter that lies between two checkpoints: the largest changes (lottery-ticket selection).


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


# What changed between two checkpoints besides the weights that deltas can hold: norms, biases and the rest.


_FULL = "it has one dimension; norms_and_biases=True saves it in full"
_UNSUPPORTED = "it belongs to no layer that SpIEL can adapt"
_OTHER = "it is neither a bias nor the parameter of a norm"


@dataclass
class SmallTensors:
    """Tensors that are saved in full beside deltas.

    Attributes:
        tensors: by their key in an adapter file.
        modules: the modules among them, for ``modules_to_save``.
        has_biases: whether biases of other modules are among them.
        left_out: parameters that differ and are not among them, with the reason.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    has_biases: bool = False
    left_out: dict[str, str] = field(default_factory=dict)


def find_small_tensors(
    base: Checkpoint,
    finetuned: Checkpoint,
    adapted: Collection[str],
    adaptable: Collection[str],
    include: bool,
    as_in_base: bool,
) -> SmallTensors:
    """Collect changed norms and biases.

    Args:
        base, finetuned: two checkpoints with the same names.
        adapted: modules whose weights become deltas.
        adaptable: modules whose weights could; those that are not adapted were left out by the caller.
        include: take norms and biases in; else they are only listed as left out.
        as_in_base: take the values of the base instead of the fine-tuned ones.
    """
    found = SmallTensors()
    changed = _changed(base, finetuned, set(adaptable), found.left_out)
    if not include:
        found.left_out.update(dict.fromkeys(changed, _FULL))
        return found
    source = base if as_in_base else finetuned
    norms = {module: leaves for module, leaves in _leaves(base).items() if _is_norm(base, module, leaves)}
    changed_norms = [module for module in norms if any(f"{module}.{leaf}" in changed for leaf in norms[module])]
    # PEFT saves every module whose name ends like one it is told to save.
    found.modules = {module for module in norms if module.endswith(tuple(changed_norms))}
    for module in found.modules:
        for leaf in norms[module]:
            found.tensors[f"{module}.{leaf}"] = _full(source.get(f"{module}.{leaf}"))
    for name in changed:
        module, _, leaf = name.rpartition(".")
        if module in found.modules:
            continue
        if leaf != "bias":
            found.left_out[name] = _OTHER
            continue
        found.tensors[f"{module}.base_layer.bias" if module in adapted else name] = _full(source.get(name))
        found.has_biases = True
    return found


def _full(tensor: StoredTensor) -> Tensor:
    return tensor.read().view(tensor.shape)


def _changed(base: Checkpoint, finetuned: Checkpoint, adaptable: set[str], left_out: dict[str, str]) -> list[str]:
    """Parameters of one dimension that differ; those of more that no layer can adapt are noted as left out."""
    changed = []
    for name in base.stored:
        module, _, leaf = name.rpartition(".")
        before, after = base.get(name), finetuned.get(name)
        if leaf == "weight" and module in adaptable:
            continue
        if after is None or after.shape != before.shape:
            left_out[name] = f"{finetuned.where} has no tensor of that name and shape"
        elif before.dtype is not None and before.dtype.is_floating_point and Difference(name, before, after).changed():
            if len(before.shape) > 1:
                left_out[name] = _UNSUPPORTED
            else:
                changed.append(name)
    left_out.update({name: f"{base.where} has no such tensor" for name in finetuned.stored if base.get(name) is None})
    fused = base.converted.keys() | finetuned.converted.keys()
    left_out.update(dict.fromkeys(fused, "it is stored in another layout than the model's; nothing was compared"))
    return changed


def _leaves(checkpoint: Checkpoint) -> dict[str, list[str]]:
    leaves: dict[str, list[str]] = {}
    for name in checkpoint.stored:
        module, _, leaf = name.rpartition(".")
        leaves.setdefault(module, []).append(leaf)
    return leaves


def _is_norm(checkpoint: Checkpoint, module: str, leaves: list[str]) -> bool:
    """Whether a module's parameters all have one dimension, and one of them is called weight."""
    return "weight" in leaves and all(len(checkpoint.get(f"{module}.{leaf}").shape) == 1 for leaf in leaves)
