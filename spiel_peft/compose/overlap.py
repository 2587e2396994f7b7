"""Compares adapters: how many positions of the same weights they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..files.adapter_file import AdapterFile
from .active import check_existing, deltas_by_module, tuner_of
from .rules import Pair, check_adapter_names

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Overlap:
    """Counts of positions in one weight, or in several weights together.

    Attributes:
        sizes: number of deltas of each adapter.
        shared: positions that all adapters hold.
        union: positions that at least one of them holds.
        conflicts: positions at which two adapters have deltas of opposite sign.
    """

    sizes: tuple[int, ...]
    shared: int
    union: int
    conflicts: int

    @property
    def fraction(self) -> float:
        """Shared positions over all positions, 0 if there are none."""
        return self.shared / self.union if self.union else 0.0

    def __add__(self, other: Overlap) -> Overlap:
        sizes = tuple(a + b for a, b in zip(self.sizes, other.sizes, strict=True))
        return Overlap(sizes, self.shared + other.shared, self.union + other.union, self.conflicts + other.conflicts)


@dataclass(frozen=True)
class OverlapReport:
    """How the positions of several adapters overlap.

    Attributes:
        adapters: names of the adapters, in the order of `Overlap.sizes`.
        modules: overlap of all adapters by module name, for every module that an adapter has deltas in.
        pairs: overlap of any two adapters, over all modules.
        total: overlap of all adapters, over all modules.
    """

    adapters: tuple[str, ...]
    modules: dict[str, Overlap]
    pairs: dict[tuple[str, str], Overlap]
    total: Overlap

    def __str__(self) -> str:
        total = self.total
        sizes = ", ".join(f"{name} {size}" for name, size in zip(self.adapters, total.sizes, strict=True))
        return (
            f"deltas: {sizes}; {total.shared} of {total.union} positions shared ({total.fraction:.1%}), "
            f"{total.conflicts} with opposite signs"
        )


def overlap(model: PeftModel | nn.Module, adapters: Sequence[str]) -> OverlapReport:
    """Compare the positions of adapters of a model.

    Args:
        model: a `PeftModel`, or the `SpIELModel` in it.
        adapters: names of SpIEL adapters; one is enough.

    Raises:
        ValueError: an unknown or repeated name.
    """
    names = check_adapter_names(adapters)
    tuner = tuner_of(model)
    check_existing(tuner, names)
    pairs = [{module: delta() for module, delta in deltas_by_module(tuner, name).items()} for name in names]
    return overlap_of_pairs(dict(zip(names, pairs, strict=True)))


def overlap_of_files(adapters: Mapping[str, AdapterFile]) -> OverlapReport:
    """Compare the positions of adapters that were read from files, by any name."""
    return overlap_of_pairs(
        {
            name: {module: (stored.indices, stored.values) for module, stored in adapter.deltas.items()}
            for name, adapter in adapters.items()
        }
    )


def overlap_of_pairs(adapters: Mapping[str, Mapping[str, Pair]]) -> OverlapReport:
    """Compare adapters given as indices and values ``[k]`` by module name."""
    names = tuple(adapters)
    if not names:
        raise ValueError("adapters is empty: name at least one adapter")
    modules = {}
    pairs = {pair: Overlap((0, 0), 0, 0, 0) for pair in combinations(names, 2)}
    total = Overlap((0,) * len(names), 0, 0, 0)
    for module in dict.fromkeys(module for deltas in adapters.values() for module in deltas):
        held = [adapters[name].get(module) for name in names]
        modules[module] = _overlap(held)
        total += modules[module]
        for i, j in combinations(range(len(names)), 2):
            pairs[names[i], names[j]] += modules[module] if len(names) == 2 else _overlap([held[i], held[j]])
    return OverlapReport(names, modules, pairs, total)


def _overlap(deltas: Sequence[Pair | None]) -> Overlap:
    sizes = tuple(0 if delta is None else delta[0].numel() for delta in deltas)
    present = [delta for delta in deltas if delta is not None]
    if not present:
        return Overlap(sizes, 0, 0, 0)
    joined = torch.cat([indices.to(torch.int64) for indices, _ in present])
    positions, slots, holders = torch.unique(joined, return_inverse=True, return_counts=True)
    signs = torch.cat([values.detach().sign().to(torch.int8) for _, values in present])
    up, down = (torch.zeros_like(positions).index_add_(0, slots, (signs == s).to(torch.int64)) for s in (1, -1))
    shared = int((holders == len(deltas)).sum())
    return Overlap(sizes, shared, positions.numel(), int(((up > 0) & (down > 0)).sum()))
