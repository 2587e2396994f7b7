"""Weighted combinations of sparse deltas: pure functions on indices and values.

The combination types are PEFT's for LoRA (linear; DARE: Yu et al., 2024; TIES: Yadav et al., 2023), applied to the
deltas themselves. A position that an adapter does not hold counts as a zero of that adapter, so that a result equals
what the same rule gives on dense tensors, without ever making one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from spiel_kernels import stable_topk, union_positions
from spiel_kernels.index_set import seeded_generator

from .. import checks as check
from ..budget import density_count

COMBINATION_TYPES = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
SIGN_METHODS = ("total", "frequency")

# ``indices`` ``[k]`` (sorted, unique) and ``values`` ``[k]`` of one delta.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Combination:
    """How adapters are combined; checked when it is made.

    Args:
        weights: one finite number per adapter, in their order.
        combination_type: "linear": the weighted sum. "magnitude_prune": the same after each adapter has kept its
            largest deltas only. "ties": then a sign is elected for every position, and the mean of the weighted deltas
            that have it is taken. "dare_linear" and "dare_ties": the same two, but each adapter keeps random deltas,
            which are scaled up by 1 / density.
        density: share of each adapter's own deltas that is kept, above 0 and at most 1; for all types except "linear".
        majority_sign_method: which sign is elected: "total" (that of the sum of the deltas) or "frequency" (that of
            more adapters). A tie is positive. The weights have no part in it.
        seed: determines the random choices.
        drop_zeros: leave out positions whose combined value is exactly zero.

    Raises:
        ValueError: names the argument and what to pass instead.
    """

    weights: tuple[float, ...]
    combination_type: str = "linear"
    density: float | None = None
    majority_sign_method: str = "total"
    seed: int = 0
    drop_zeros: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", _checked_weights(self.weights))
        self._check_type()
        self._check_density()
        remedy = 'Pass "total" or "frequency".'
        check.choice("majority_sign_method", self.majority_sign_method, SIGN_METHODS, remedy)
        check.integer("seed", self.seed, 0, "Pass an int.")
        check.boolean("drop_zeros", self.drop_zeros, "Pass a plain bool.")

    def _check_type(self) -> None:
        kind = self.combination_type
        if kind == "cat" or (isinstance(kind, str) and kind.endswith("svd")):
            raise ValueError(
                f"combination_type={kind!r} is about LoRA's low-rank factors; sparse deltas have none. Pass 'linear', "
                "which is exact here."
            )
        check.choice("combination_type", kind, COMBINATION_TYPES, "Pass 'linear' for the weighted sum.")

    def _check_density(self) -> None:
        if self.combination_type == "linear":
            if self.density is not None:
                remedy = "Drop it, or pass another combination_type."
                check.refuse("density", "has no effect with combination_type='linear'", self.density, remedy)
            return
        remedy = "It is the share of each adapter's deltas that is kept: 0.5 keeps half of them."
        if self.density is None:
            check.refuse("density", f"is needed with combination_type={self.combination_type!r}", None, remedy)
        object.__setattr__(self, "density", check.density("density", self.density, remedy))

    @property
    def draws(self) -> bool:
        return self.combination_type.startswith("dare")

    @property
    def elects(self) -> bool:
        return self.combination_type.endswith("ties")


def _checked_weights(weights: Iterable[float]) -> tuple[float, ...]:
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise ValueError(f"weights must be a list of numbers, one per adapter, got {weights!r}")
    numbers = []
    for weight in weights:
        try:
            number = math.nan if isinstance(weight, (bool, str)) else float(weight)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"weights must be finite numbers, one per adapter, got {weight!r}")
        numbers.append(number)
    return tuple(numbers)


def check_adapter_names(names: Sequence[str], field: str = "adapters") -> list[str]:
    """The names as a list. Raises ValueError, naming the argument `field`, unless they are distinct strings."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{field} must be a list of adapter names, got {names!r}")
    listed = list(names)
    if not listed:
        raise ValueError(f"{field} is empty: name at least one adapter")
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise ValueError(f"{field} names {twice} more than once: name each adapter once")
    return listed


def check_weight_count(weights: Sequence[float], adapters: Sequence[object]) -> None:
    """Raise a ValueError unless there is one weight per adapter."""
    if len(weights) != len(adapters):
        raise ValueError(
            f"weights has {len(weights)} entries for {len(adapters)} adapters: give one weight per adapter"
        )


def combine_deltas(deltas: Sequence[Pair | None], how: Combination, module_name: str) -> Pair:
    """Combine the deltas of several adapters to one weight.

    Args:
        deltas: one entry per adapter, in the order of ``how.weights``: its indices and values ``[k]``, or None if the
            adapter does not change this weight. All on one device.
        how: the rule.
        module_name: name of the weight's module; random choices depend on it, on the seed and on an adapter's place
            in the list, and on nothing else.

    Returns:
        ``(indices, values)``, both ``[u]``: the sorted unique positions that at least one adapter still holds after
        pruning; the combined values, summed in float64 and rounded once, to the widest dtype among the values given.
        Both are empty if no position is left.

    Raises:
        ValueError: no adapter has deltas here, or a combined value is not finite.
    """
    if len(deltas) != len(how.weights):
        raise ValueError(f"{module_name}: {len(deltas)} deltas for {len(how.weights)} weights")
    present = [delta for delta in deltas if delta is not None]
    if not present:
        raise ValueError(f"{module_name}: no adapter has deltas here")
    kept = [_pruned(*delta, how, module_name, place) for place, delta in enumerate(deltas) if delta is not None]
    positions = union_positions(kept)
    table = torch.zeros(len(kept), positions.numel(), dtype=torch.float64, device=positions.device)
    for row, (indices, values) in zip(table, kept, strict=True):
        row[torch.searchsorted(positions, indices)] = values
    weights = [weight for weight, delta in zip(how.weights, deltas, strict=True) if delta is not None]
    dtype = reduce(torch.promote_types, (values.dtype for _, values in present))
    values = _combined(table, torch.tensor(weights, dtype=torch.float64, device=table.device), how).to(dtype)
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{module_name}: combined deltas are not finite in {dtype}; lower the weights")
    if how.drop_zeros:
        held = values != 0
        positions, values = positions[held], values[held]
    width = reduce(torch.promote_types, (indices.dtype for indices, _ in present))
    return positions.to(width), values


def _pruned(indices: Tensor, values: Tensor, how: Combination, module_name: str, place: int) -> Pair:
    """The deltas of one adapter that are kept: int64 positions and float64 values."""
    positions, values = indices.to(torch.int64), values.detach().to(torch.float64)
    if how.density is None:
        return positions, values
    if how.draws:
        generator = seeded_generator(how.seed, f"dare\0{module_name}", place)
        kept = (torch.rand(values.numel(), generator=generator, dtype=torch.float64) < how.density).to(values.device)
        return positions[kept], values[kept] / how.density
    slots = stable_topk(values.abs(), density_count(how.density, values.numel()) if values.numel() else 0)
    return positions[slots], values[slots]


def _combined(table: Tensor, weights: Tensor, how: Combination) -> Tensor:
    """Combined values ``[u]`` of the adapters' deltas ``[n, u]`` (zero without a delta) and their weights ``[n]``."""
    weighted = table * weights[:, None]
    if not how.elects:
        return weighted.sum(0)
    signs = table.sign()
    votes = (table if how.majority_sign_method == "total" else signs).sum(0)
    agree = signs == torch.where(votes >= 0, 1.0, -1.0)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)
