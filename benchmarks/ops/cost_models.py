"""Fits the two cost models by which the gather is chosen to measured times: one for a CPU, one for a GPU."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..timing import median

SAMPLED = "gather sampled"


@dataclass(frozen=True)
class SampledFit:
    """The cost model of the sampled gather on a CPU: cost / dense = A (out + in) / (out in) + B density.

    Attributes:
        per_size: A; per_density: B.
        relative_error: root mean square of (rule - measured) / measured.
        points: number of measurements.
    """

    per_size: float
    per_density: float
    relative_error: float
    points: int

    def over_dense(self, rows: int, cols: int, density: float) -> float:
        return self.per_size * (rows + cols) / (rows * cols) + self.per_density * density


def fit_sampled(points: Iterable[tuple[int, int, float, float]]) -> SampledFit:
    """Fit both constants by least squares of the relative error.

    Args:
        points: ``(rows, cols, density, measured cost over dense)``, at least two.

    Raises:
        ValueError: fewer than two points.
    """
    points = list(points)
    if len(points) < 2:
        raise ValueError(f"two constants need at least two measurements, got {len(points)}")
    terms = torch.tensor([[(r + c) / (r * c), d] for r, c, d, _ in points], dtype=torch.float64)
    measured = torch.tensor([ratio for *_, ratio in points], dtype=torch.float64)
    scaled = terms / measured[:, None]
    # Neither constant can be negative, so fit both and each alone, and take the best fit without a negative one.
    best, error = torch.zeros(2, dtype=torch.float64), float("inf")
    for used in ([0, 1], [0], [1]):
        constants = torch.zeros(2, dtype=torch.float64)
        constants[used] = torch.linalg.lstsq(scaled[:, used], torch.ones(len(points), 1, dtype=torch.float64)).solution[
            :, 0
        ]
        residual = float((scaled @ constants - 1).square().mean().sqrt())
        if bool((constants >= 0).all()) and residual < error:
            best, error = constants, residual
    return SampledFit(float(best[0]), float(best[1]), error, len(points))


def sampled_points(results: Iterable[dict[str, Any]]) -> dict[tuple[int, str], list[tuple[int, int, float, float]]]:
    """The successful measurements of the sampled gather, by (tokens, dtype)."""
    points: dict[tuple[int, str], list[tuple[int, int, float, float]]] = {}
    for entry in results:
        if entry["op"] == SAMPLED and "failed" not in entry:
            ratio = median(entry["seconds"]) / median(entry["dense_seconds"])
            density = entry["k"] / (entry["rows"] * entry["cols"])
            points.setdefault((entry["tokens"], entry["dtype"]), []).append(
                (entry["rows"], entry["cols"], density, ratio)
            )
    return points


def fits(results: Iterable[dict[str, Any]]) -> dict[tuple[int, str], SampledFit]:
    """One fit per (tokens, dtype) with two measurements or more."""
    return {key: fit_sampled(points) for key, points in sampled_points(results).items() if len(points) >= 2}


_FITTED = ("tile_efficiency", "cache_bandwidth", "memory_bandwidth", "launch")
_STEPS = (2.0, 1.3, 1.1, 1.03)
_MAX_ROUNDS = 40


def _predictions(entries: Iterable[dict[str, Any]]) -> list[tuple[Callable[[Any], float], float]]:
    """For every gather by a forced method: its seconds as a function of the `CostModel`, and as measured."""
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
    """Find the rates of a GPU with which `spiel_kernels.outer_plan` predicts measured times best.

    The error is the mean of |log(predicted / measured)|.

    Args:
        entries: measured cases; gathers by a forced method on a GPU are used.
        flops: measured FLOP/s of matrix products by dtype name; used as they are, not fitted.

    Returns:
        The fields of `CostModel`, and ``mean_factor``, the mean factor between predicted and measured times; empty
        without measurements.
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
    """One line with the fitted `CostModel`, ready to be copied into the code, and its error."""
    fields = ", ".join(f"{name}={value:.3g}" for name, value in rates.items() if name != "mean_factor")
    return (
        f"CostModel({fields}): predicted and measured times differ by a factor of {rates['mean_factor']:.2f} on average"
    )
