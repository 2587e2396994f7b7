"""Growth criteria: which inactive positions a close may grow, and which deltas it prunes for them.

This module holds the contract of a criterion, the registry, and the built-in criteria.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spiel_kernels import sample_positions, sorted_order, top_outer_positions_padded


@dataclass(frozen=True, eq=False)
class GrowthRequest:
    """The input of a growth criterion when a cycle of one matrix closes. All tensors are read-only.

    Shapes and dtypes:
        indices: int64 [k], the sorted flat positions (row-major in the weight as stored) active before the
            close.
        shape: `(rows, cols)` of the weight, seen as a matrix.
        numel: `rows * cols`; every position is in `[0, numel)`.
        count: m, how many positions the close wants to grow.
        candidates: int64 [c], the positions whose gradients were gathered in the window; None unless the
            criterion gathers.
        candidate_sums: float [c], the sum over the window's steps of each candidate's gradient; None unless
            the criterion gathers.
        row: float [rows], SM3's row accumulator; None unless the criterion accumulates.
        col: float [cols], SM3's column accumulator; None unless the criterion accumulates.
        generator: a CPU generator seeded from the config's seed, the module name and the cycle number. With another
            source of random numbers runs are not reproducible, and ranks choose different positions.
    """

    indices: torch.Tensor
    shape: tuple[int, int]
    numel: int
    count: int
    candidates: torch.Tensor | None = None
    candidate_sums: torch.Tensor | None = None
    row: torch.Tensor | None = None
    col: torch.Tensor | None = None
    generator: torch.Generator | None = None


@dataclass(frozen=True, eq=False)
class PruneRequest:
    """The input of a prune score when a cycle of one matrix closes. All tensors are read-only.

    Shapes and dtypes:
        module_name: full name of the adapted module.
        indices: int64 [k], the sorted flat positions active before the close.
        values: float [k], the deltas at these positions.
        gradient: float [k], the gradient of `values` at the step that closes, as the optimizer got it; None if there
            was none.
        count: m, how many deltas the close wants to prune.
    """

    module_name: str
    indices: torch.Tensor
    values: torch.Tensor
    gradient: torch.Tensor | None
    count: int


Propose = Callable[[GrowthRequest], torch.Tensor]
PruneScore = Callable[[PruneRequest], torch.Tensor]


@dataclass(frozen=True)
class GrowthCriterion:
    """A named rule that chooses which positions a close grows and which deltas it prunes.

    Attributes:
        name: the value of `SpIELConfig(growth=...)` that selects the criterion.
        propose: function from a `GrowthRequest` to int64 positions in `[0, numel)`, without repeats, best first, any
            number of them. An active position is allowed and means "keep it if it would be pruned". -1 stands for no
            position and may be repeated, so that a result of fixed size needs no wait for a GPU. None: the close
            neither prunes nor grows.
        gathers: whether `propose` needs `candidates` and `candidate_sums`, gathered over `accumulation_steps` steps.
        accumulates: whether `propose` needs SM3's `row` and `col`.
        prune_score: function from a `PruneRequest` to float [k] without NaN. The deltas with the lowest scores are
            pruned, among equal scores that at the lowest position first; those with an infinite score last. None: the
            absolute value of the delta (Ansell et al., 2024, section 3.1).
        candidates_per_grown: number of candidates in a window for each delta that its close can grow, where the config
            does not say (`SpIELConfig.candidates`); never more candidates than deltas. None: as many as deltas.
    """

    name: str
    propose: Propose | None
    gathers: bool = False
    accumulates: bool = False
    prune_score: PruneScore | None = None
    candidates_per_grown: float | None = None


_CRITERIA: dict[str, GrowthCriterion] = {}


def register_growth_criterion(
    name: str,
    propose: Propose | None,
    *,
    gathers: bool = False,
    accumulates: bool = False,
    prune_score: PruneScore | None = None,
    candidates_per_grown: float | None = None,
    override: bool = False,
) -> GrowthCriterion:
    """Make `SpIELConfig(growth=name)` use `propose` (contract: `GrowthCriterion`). Returns the criterion.

    Raises:
        ValueError: a name that is not an identifier or is taken (`override=True` replaces it), a flag that is
            not a bool, `candidates_per_grown` that is not a number of at least 1 or is given without `gathers`, or a
            criterion without `propose` that asks for data.
        TypeError: `propose` or `prune_score` is neither callable nor None.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            f"`name` of a growth criterion must be letters, digits and underscores, the first no digit, "
            f"got {name!r}. Pick a name such as 'largest_weight'."
        )
    for flag, value in (("gathers", gathers), ("accumulates", accumulates), ("override", override)):
        _require_bool(name, flag, value)
    if propose is not None and not callable(propose):
        raise TypeError(
            f"`propose` of growth criterion {name!r} must be a function from a GrowthRequest to positions, "
            f"or None to never grow, got {propose!r}. Pass the function itself, not its result."
        )
    if prune_score is not None and not callable(prune_score):
        raise TypeError(
            f"`prune_score` of growth criterion {name!r} must be a function from a PruneRequest to scores, or None for "
            f"the deltas' absolute values, got {prune_score!r}. Pass the function itself, not its result."
        )
    if propose is None and (gathers or accumulates or prune_score is not None):
        raise ValueError(
            f"growth criterion {name!r} has `propose=None` but gathers={gathers}, accumulates={accumulates}, "
            f"prune_score={prune_score!r}: a criterion that never grows never prunes and reads no data. Drop these or "
            "pass `propose`."
        )
    _check_candidates(name, candidates_per_grown, gathers)
    if name in _CRITERIA and not override:
        raise ValueError(
            f"`name` of a growth criterion must be unused, got {name!r}, which is registered already. Pick "
            "another name or pass `override=True`."
        )
    criterion = GrowthCriterion(name, propose, gathers, accumulates, prune_score, candidates_per_grown)
    _CRITERIA[name] = criterion
    return criterion


def get_growth_criterion(name: str) -> GrowthCriterion:
    """The criterion registered as `name`. Raises a ValueError with the registered names if there is none."""
    criterion = _CRITERIA.get(name) if isinstance(name, str) else None
    if criterion is None:
        raise ValueError(
            f"`growth` must be a registered growth criterion, got {name!r}. Use one of {growth_criteria()}, "
            "or call spiel_peft.register_growth_criterion(name, propose) first."
        )
    return criterion


def growth_criteria() -> list[str]:
    """Names of all registered criteria, built-in ones first."""
    return list(_CRITERIA)


def _check_candidates(name: str, candidates_per_grown: Any, gathers: bool) -> None:
    """Raise a ValueError for a wrong `candidates_per_grown`."""
    if candidates_per_grown is None:
        return
    is_number = isinstance(candidates_per_grown, (int, float)) and not isinstance(candidates_per_grown, bool)
    if not is_number or not 1 <= candidates_per_grown < math.inf:
        raise ValueError(
            f"`candidates_per_grown` of growth criterion {name!r} must be a number of at least 1, got "
            f"{candidates_per_grown!r}. With fewer candidates a close could not grow what it prunes; None takes as "
            "many candidates as deltas."
        )
    if not gathers:
        raise ValueError(
            f"`candidates_per_grown` of growth criterion {name!r} works only with `gathers=True`, got "
            f"{candidates_per_grown!r}. Drop it: no candidates are gathered."
        )


def _require_bool(name: str, flag: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(
            f"`{flag}` of growth criterion {name!r} must be True or False, got {value!r}. Pass a plain bool."
        )


def accumulated_gradient(request: GrowthRequest) -> Tensor:
    """SpIEL-AG (Ansell et al., 2024, section 3.2): the candidates, those with the largest absolute gradient sum first.

    Candidates with a sum of zero are left out: -1 stands in their places, at the end. Among equal sums the lowest
    position comes first.
    """
    if request.candidates is None or request.candidate_sums is None:
        return torch.empty(0, dtype=torch.int64, device=request.indices.device)
    scores = request.candidate_sums.abs()
    # Candidates are in ascending order, so a stable sort puts the lowest position first among equal sums.
    order = sorted_order(scores, descending=True)
    return torch.where(scores > 0, request.candidates, -1).index_select(0, order)


def momentum(request: GrowthRequest) -> Tensor:
    """SpIEL-MA (Ansell et al., 2024, section 3.3): the inactive positions with the largest log row + log col.

    `row` and `col` are SM3's accumulators. Positions where one of them is zero are left out: -1 stands in the places of
    missing ones, at the end.
    """
    if request.row is None or request.col is None:
        return torch.empty(0, dtype=torch.int64, device=request.indices.device)
    return top_outer_positions_padded(request.row, request.col, request.indices, request.count)


def random(request: GrowthRequest) -> Tensor:
    """Inactive positions, drawn uniformly."""
    inactive = request.numel - request.indices.numel()
    count = min(request.count, inactive)
    ranks = sample_positions(inactive, count, request.generator)
    active = request.indices.cpu()
    # The r-th inactive position is r plus the number of active positions below it. active[j] - j is the number of
    # inactive positions below active[j] and never falls, so that number is the count of offsets that are at most r.
    offsets = active - torch.arange(active.numel())
    positions = ranks + torch.searchsorted(offsets, ranks, right=True)
    return positions[torch.randperm(count, generator=request.generator)].to(request.indices.device)


BUILT_IN = (accumulated_gradient, momentum, random)

register_growth_criterion("accumulated_gradient", accumulated_gradient, gathers=True)
register_growth_criterion("momentum", momentum, accumulates=True)
register_growth_criterion("random", random)
register_growth_criterion("none", None)
