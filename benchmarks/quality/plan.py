"""The cells of the plan: the studies of ``plan.json``, with the choices that results so far allow.

A screen decides its later rates by its earlier cells, and other studies take the rates that a screen has chosen, so
cells become known one after the other. What is not known yet is counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from . import methods, tasks
from .cell import Cell

PLAN = Path(__file__).parent / "plan.json"
WINNER = "winner"
# How often a screen's grid is extended where the best rate is at its edge.
MAX_EXTENSIONS = 3
STUDIES = ("base", "screen", "ablate", "landmarks", "finals")

Results = Mapping[str, Mapping[str, Any]]


@dataclass
class Stage:
    """One study of the plan, with the cells that are known so far.

    Attributes:
        title: what tables call it.
        tier: of all its cells.
        cells: known ones, in the order in which they are to run.
        unknown: how many more there will be at least.
        waits_for: why they are not known; empty if all are.
        chosen: of a screen, the best rate of each method that is through.
    """

    title: str
    tier: str
    cells: list[Cell] = field(default_factory=list)
    unknown: int = 0
    waits_for: set[str] = field(default_factory=set)
    chosen: dict[str, float] = field(default_factory=dict)


def load(path: Path = PLAN) -> dict[str, Any]:
    """The plan, with every method's settings in full.

    Raises:
        ValueError: a study, method or setting that nothing knows.
    """
    plan = json.loads(path.read_text())
    if plan["winner"] is not None:
        plan["methods"][WINNER] = plan["winner"]
    resolved = {name: _settings(plan["methods"], name) for name in plan["methods"]}
    for settings in resolved.values():
        methods.check_settings(settings)
    plan["methods"] = resolved
    for study in plan["studies"]:
        if study["study"] not in STUDIES:
            raise ValueError(f"study must be one of {STUDIES}, got {study['study']!r}")
        if (study["tier"], study["task"]) not in tasks.TASKS:
            raise ValueError(f"tier and task must be one of {sorted(tasks.TASKS)}, got {study}")
        named = {*study.get("rates", ()), *study.get("methods", ()), study.get("of", "base")}
        if unknown := named - resolved.keys() - {WINNER}:
            raise ValueError(f"study {_title(study)!r} names unknown methods {sorted(unknown)}")
        for variant in study.get("variants", {}).values():
            methods.check_settings(variant)
    return plan


def unfold(plan: dict[str, Any], results: Results) -> list[Stage]:
    """The cells of every study that are known from the results so far.

    Args:
        plan: from `load`.
        results: finished cells by `Cell.name`.
    """
    chosen: dict[tuple[str, str, int], dict[str, float]] = {}
    stages = []
    unfolders: dict[str, Callable[..., None]] = {
        "base": _base,
        "screen": _screen,
        "ablate": _ablate,
        "landmarks": _landmarks,
        "finals": _finals,
    }
    for study in plan["studies"]:
        stage = Stage(_title(study), study["tier"])
        key = (study["tier"], study.get("rates_from", study["task"]), study.get("r", 0))
        unfolders[study["study"]](plan, study, stage, results, chosen.get(key, {}))
        if study["study"] == "screen":
            chosen[key] = stage.chosen
        stages.append(stage)
    return stages


def loss_of(result: Mapping[str, Any]) -> float:
    """Validation loss at the last step; infinite where the training diverged."""
    return math.inf if result["diverged_at"] is not None else float(result["scores"]["validation"]["loss"])


def _settings(table: dict[str, Any], name: str) -> dict[str, Any]:
    entry = dict(table[name])
    like = entry.pop("like", None)
    return entry if like is None else _settings(table, like) | entry


def _title(study: dict[str, Any]) -> str:
    budget = f", r={study['r']}" if "r" in study else ""
    return f"{study['study']}, tier {study['tier']}, {study['task']}{budget}"


def _cell(
    plan: dict[str, Any], study: dict[str, Any], method: str, settings: dict[str, Any], rate: float, seed: int
) -> Cell:
    return Cell(
        study=study["study"],
        tier=study["tier"],
        task=study["task"],
        method=method,
        settings=settings,
        r=study.get("r", 0),
        rate=rate,
        seed=seed,
        steps=plan["tiers"][study["tier"]]["steps"],
    )


Rates = Mapping[str, float]


def _base(plan: dict[str, Any], study: dict[str, Any], stage: Stage, results: Results, rates: Rates) -> None:
    stage.cells.append(_cell(plan, study, "base", {}, 0.0, 0))


def _screen(plan: dict[str, Any], study: dict[str, Any], stage: Stage, results: Results, rates: Rates) -> None:
    refined = 2 + 3 * (len(study["seeds"]) - 1) if "refine" in study else 0
    for method, grid in study["rates"].items():
        if method not in plan["methods"]:
            stage.unknown += len(grid) + refined
            stage.waits_for.add("the winner of the ablation, to be named in plan.json")
            continue
        search = _Search(plan, study, method, results)
        stage.cells += search.cells
        if search.best is None:
            stage.unknown += refined
            if refined:
                stage.waits_for.add("its own first cells")
        else:
            stage.chosen[method] = search.best


class _Search:
    """The search of one method's rate: a coarse grid with one seed, extended at its edges, then its neighbourhood.

    Attributes:
        cells: those known.
        best: the rate with the lowest mean validation loss, or None while cells are missing.
    """

    def __init__(self, plan: dict[str, Any], study: dict[str, Any], method: str, results: Results) -> None:
        self.cells: list[Cell] = []
        self.best: float | None = None
        self._plan, self._study, self._method, self._results = plan, study, method, results
        first = study["seeds"][:1]
        rates = sorted(study["rates"][method])
        losses = self._losses(rates, first)
        for _ in range(MAX_EXTENSIONS):
            beyond = self._beyond(losses)
            if beyond is None:
                break
            rates = sorted([*rates, beyond])
            losses = self._losses(rates, first)
        if losses is None:
            return
        coarse = min(losses, key=lambda rate: (losses[rate], rate))
        if "refine" not in study:
            self.best = coarse
            return
        near = self._losses([coarse / study["refine"], coarse, coarse * study["refine"]], study["seeds"])
        self.best = None if near is None else min(near, key=lambda rate: (near[rate], rate))

    def _beyond(self, losses: dict[float, float] | None) -> float | None:
        """The rate that extends a grid whose best is at an edge."""
        if losses is None:
            return None
        best = min(losses, key=lambda rate: (losses[rate], rate))
        if best == max(losses):
            return best * self._study["factor"]
        return best / self._study["factor"] if best == min(losses) else None

    def _losses(self, rates: list[float], seeds: list[int]) -> dict[float, float] | None:
        """Mean validation loss over seeds by rate; None while one is missing."""
        settings = self._plan["methods"][self._method]
        losses: dict[float, float] = {}
        complete = True
        for rate in rates:
            of_rate = [_cell(self._plan, self._study, self._method, settings, rate, seed) for seed in seeds]
            self.cells += [cell for cell in of_rate if cell not in self.cells]
            if all(cell.name in self._results for cell in of_rate):
                losses[rate] = mean(loss_of(self._results[cell.name]) for cell in of_rate)
            else:
                complete = False
        return losses if complete else None


def _ablate(plan: dict[str, Any], study: dict[str, Any], stage: Stage, results: Results, rates: Rates) -> None:
    if study["of"] not in rates:
        stage.unknown = len(study["variants"]) * len(study["seeds"])
        stage.waits_for.add(f"the rate of {study['of']}")
        return
    settings = plan["methods"][study["of"]]
    stage.cells = [
        _cell(plan, study, variant, settings | changed, rates[study["of"]], seed)
        for variant, changed in study["variants"].items()
        for seed in study["seeds"]
    ]


def _landmarks(plan: dict[str, Any], study: dict[str, Any], stage: Stage, results: Results, rates: Rates) -> None:
    for method, at in study["methods"].items():
        if at["rates_of"] not in rates:
            stage.unknown += len(at["times"]) * len(study["seeds"])
            stage.waits_for.add(f"the rate of {at['rates_of']}")
            continue
        stage.cells += [
            _cell(plan, study, method, plan["methods"][method], rates[at["rates_of"]] * times, seed)
            for times in at["times"]
            for seed in study["seeds"]
        ]


def _finals(plan: dict[str, Any], study: dict[str, Any], stage: Stage, results: Results, rates: Rates) -> None:
    known = [method for method in study["methods"] if method in rates]
    for method in study["methods"]:
        if method not in rates:
            stage.unknown += len(study["seeds"])
            stage.waits_for.add(f"the rate of {method}")
    # Seed by seed, so that a queue that is stopped leaves whole pairs.
    stage.cells = [
        _cell(plan, study, method, plan["methods"][method], rates[method], seed)
        for seed in study["seeds"]
        for method in known
    ]


def pending(stages: list[Stage], results: Results, tier: str | None = None) -> Iterator[Cell]:
    """Known cells without a result, in order; of one tier only if `tier` is given."""
    for stage in stages:
        if tier is None or stage.tier == tier:
            yield from (cell for cell in stage.cells if cell.name not in results)
