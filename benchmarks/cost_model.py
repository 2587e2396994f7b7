"""The cost model of the sampled gather, fitted to measurements: cost / dense = A (out + in) / (out in) + B density."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .timing import median

SAMPLED = "gather sampled"


@dataclass(frozen=True)
class SampledFit:
    """Constants of the rule, and how well they fit.

    Attributes:
        per_size: A; per_density: B.
        relative_error: root mean square of (rule - measured) / measured.
        points: how many measurements were fitted.
    """

    per_size: float
    per_density: float
    relative_error: float
    points: int

    def over_dense(self, rows: int, cols: int, density: float) -> float:
        return self.per_size * (rows + cols) / (rows * cols) + self.per_density * density


def fit_sampled(points: Iterable[tuple[int, int, float, float]]) -> SampledFit:
    """Least squares of the relative error.

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
    # Neither cost can be negative: the better of both, or one alone.
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
    """The measurements of the sampled gather that did not fail, by (tokens, dtype)."""
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
