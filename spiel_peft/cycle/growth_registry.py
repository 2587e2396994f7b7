"""The registry of growth criteria: which inactive positions a close may grow.

This file holds only names and contracts, so that `spiel_peft.config` can check a criterion without importing
the cycle. The built-in criteria live in `spiel_peft.cycle.growth`, which is imported on first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_BUILT_INS = "spiel_peft.cycle.growth"


@dataclass(frozen=True, eq=False)
class GrowthRequest:
    """What a growth criterion may look at when a cycle of one matrix closes. All tensors are read-only.

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
        generator: a CPU generator seeded from the config's seed, the module name and the cycle number. Draw
            from nothing else, or runs are not reproducible and ranks drift apart.
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


Propose = Callable[[GrowthRequest], torch.Tensor]


@dataclass(frozen=True)
class GrowthCriterion:
    """A named way to choose what grows.

    Attributes:
        name: what `SpIELConfig(growth=...)` says.
        propose: from a `GrowthRequest` to int64 positions in `[0, numel)`, without repeats, best first, as
            many as it likes. An active position is allowed and means "keep it if it would be pruned". None:
            never grow, so the close neither prunes nor grows.
        gathers: `propose` needs `candidates` and `candidate_sums`, gathered over `accumulation_steps` steps.
        accumulates: `propose` needs SM3's `row` and `col`.
    """

    name: str
    propose: Propose | None
    gathers: bool = False
    accumulates: bool = False


_CRITERIA: dict[str, GrowthCriterion] = {}


def register_growth_criterion(
    name: str,
    propose: Propose | None,
    *,
    gathers: bool = False,
    accumulates: bool = False,
    override: bool = False,
) -> GrowthCriterion:
    """Make `SpIELConfig(growth=name)` use `propose` (contract: `GrowthCriterion`). Returns the criterion.

    Raises:
        ValueError: a name that is not an identifier or is taken (`override=True` replaces it), a flag that is
            not a bool, or a criterion without `propose` that asks for data.
        TypeError: `propose` is neither callable nor None.
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
    if propose is None and (gathers or accumulates):
        raise ValueError(
            f"growth criterion {name!r} has `propose=None` but gathers={gathers}, accumulates={accumulates}: "
            "nothing would read that data. Drop the flags or pass `propose`."
        )
    _load_built_ins()
    if name in _CRITERIA and not override:
        raise ValueError(
            f"`name` of a growth criterion must be unused, got {name!r}, which is registered already. Pick "
            "another name or pass `override=True`."
        )
    criterion = GrowthCriterion(name, propose, gathers=gathers, accumulates=accumulates)
    _CRITERIA[name] = criterion
    return criterion


def get_growth_criterion(name: str) -> GrowthCriterion:
    """The criterion registered as `name`; ValueError naming the registered ones if there is none."""
    criterion = _CRITERIA.get(name) if isinstance(name, str) else None
    if criterion is None:
        _load_built_ins()
        criterion = _CRITERIA.get(name) if isinstance(name, str) else None
    if criterion is None:
        raise ValueError(
            f"`growth` must be a registered growth criterion, got {name!r}. Use one of {growth_criteria()}, "
            "or call spiel_peft.register_growth_criterion(name, propose) first."
        )
    return criterion


def growth_criteria() -> list[str]:
    """Names of all registered criteria, built-in ones first."""
    _load_built_ins()
    return list(_CRITERIA)


def _load_built_ins() -> None:
    # Also while that module itself is importing (it calls register_growth_criterion): Python then hands back
    # the half-initialised module instead of importing it again.
    importlib.import_module(_BUILT_INS)


def _require_bool(name: str, flag: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(
            f"`{flag}` of growth criterion {name!r} must be True or False, got {value!r}. Pass a plain bool."
        )
