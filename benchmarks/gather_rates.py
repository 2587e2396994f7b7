"""The rates of a GPU that make the cost model of the gather (`spiel_kernels.outer_plan`) agree with measured times."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .timing import median

_FITTED = ("tile_efficiency", "cache_bandwidth", "memory_bandwidth", "launch")
_STEPS = (2.0, 1.3, 1.1, 1.03)
_MAX_ROUNDS = 40


def _predictions(entries: Iterable[dict[str, Any]]) -> list[tuple[Callable[[Any], float], float]]:
    """Predicted seconds as a function of the rates, and measured ones, of every gather by a forced method."""
    from spiel_kernels import outer_plan

    pairs: list[tuple[Callable[[Any], float], float]] = []
    for entry in entries:
        if not entry["op"].startswith("gather ") or "failed" in entry or "method" not in entry:
            continue
        problem = outer_plan.Problem(
            entry["k"], entry["rows"], entry["cols"], entry["tokens"], getattr(torch, entry["dtype"])
        )
        measured = median(entry["seconds"])
        if entry["method"] == "dense":
            pairs.append((lambda model, p=problem: outer_plan.dense_seconds(p, model), measured))
        elif entry["method"] == "entries":
            pairs.append((lambda model, p=problem: outer_plan.entries_seconds(p, model), measured))
        elif entry["method"] == "compact":
            shape, tiles = tuple(entry["tile_shape"]), entry["tiles"]
            pairs.append(
                (lambda model, p=problem, s=shape, t=tiles: outer_plan.compact_seconds(p, s, t, model), measured)
            )
    return pairs


def fit_rates(entries: Iterable[dict[str, Any]], flops: dict[str, float]) -> dict[str, float]:
    """Rates under which predicted and measured times differ least (mean of |log(predicted / measured)|).

    Args:
        entries: measured cases; gathers by a forced method on a GPU are used.
        flops: measured FLOP/s of matrix products by dtype name, taken as they are.

    Returns:
        The fields of `CostModel`, and ``mean_factor`` between predicted and measured times; empty without measurements.
    """
    pairs = _predictions(entries)
    if not pairs:
        return {}
    from spiel_kernels.outer_plan import CostModel

    model = CostModel()
    if "bfloat16" in flops:
        model = dataclasses.replace(model, half_flops=flops["bfloat16"])
    if "float32" in flops:
        model = dataclasses.replace(model, single_flops=flops["float32"])

    def error(candidate: Any) -> float:
        return sum(abs(math.log(predict(candidate) / measured)) for predict, measured in pairs) / len(pairs)

    best = error(model)
    for step in _STEPS:
        for _ in range(_MAX_ROUNDS):
            before = best
            for name in _FITTED:
                for factor in (step, 1 / step):
                    candidate = dataclasses.replace(model, **{name: getattr(model, name) * factor})
                    found = error(candidate)
                    if found < best:
                        model, best = candidate, found
            if best == before:
                break
    return {**dataclasses.asdict(model), "mean_factor": math.exp(best)}


def describe_rates(rates: dict[str, float]) -> str:
    """What to put into `CostModel`, in one line."""
    fields = ", ".join(f"{name}={value:.3g}" for name, value in rates.items() if name != "mean_factor")
    return (
        f"CostModel({fields}): predicted and measured times differ by a factor of {rates['mean_factor']:.2f} on average"
    )
