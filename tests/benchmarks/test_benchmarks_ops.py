"""Single operations against their dense formulas, floors, and the cost models fitted to measurements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks_under_test import cost_models, ops_measure, registry, timing

from spiel_kernels import outer_plan

CPU = torch.device("cpu")
RATES = ops_measure.Floors(1e10, {"float32": 1e11, "bfloat16": 1e11})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", list(registry.OPERATIONS))
def test_operations_agree_with_their_dense_formulas(op: str, dtype: str) -> None:
    bench = ops_measure.Bench(CPU, RATES, seconds_per_case=0.0)
    case = ops_measure.Case(op, 64, 128, 0.05, 16, dtype)
    entry = bench.measure(case, registry.OPERATIONS[op])
    assert "failed" not in entry, entry["failed"]
    assert len(entry["seconds"]) == len(entry["dense_seconds"]) == 3 and entry["floor_seconds"] > 0
    # Rounding of the dense product swaps candidates near the threshold.
    allowed = 0.1 if op == "select" else 1e-2 if dtype == "bfloat16" else 1e-5
    assert entry.get("error", 0.0) <= allowed
    assert f"{op} " in ops_measure.describe(entry)


def test_an_operation_that_fails_is_reported_alone() -> None:
    def prepare(bench: Any, case: Any) -> Any:
        raise ImportError("no such operation yet")

    kept: list[int] = []
    cases = [ops_measure.Case(op, 64, 128, 0.05, 16) for op in ("missing", "fold")]
    operations = {"missing": prepare, "fold": registry.OPERATIONS["fold"]}
    bench = ops_measure.Bench(CPU, RATES, 0.0)
    results, left_out = ops_measure.measure_all(bench, cases, operations, keep=lambda r: kept.append(len(r)))
    assert "ImportError: no such operation yet" in results[0]["failed"] and "seconds" in results[1]
    assert kept == [1, 2] and left_out == 0
    assert ops_measure.measure_all(bench, cases, operations, timing.Clock(0.0)) == ([], 2)


def test_floors_are_the_larger_of_two_times() -> None:
    assert RATES.seconds(1e10, 0, "float32") == 1.0
    assert RATES.seconds(1e10, 3e11, "float32") == pytest.approx(3.0)
    measured = ops_measure.measure_floors(CPU, ["float32"], tiny=True)
    assert measured.bytes_per_second > 0 and measured.flops_per_second["float32"] > 0


def test_the_fit_finds_the_constants_of_the_rule() -> None:
    shapes = [(576, 576), (192, 576), (4096, 4096)]
    points = [(r, c, d, 150 * (r + c) / (r * c) + 12 * d) for r, c in shapes for d in (0.001, 0.01, 0.05)]
    fit = cost_models.fit_sampled(points)
    assert (fit.per_size, fit.per_density) == pytest.approx((150, 12)) and fit.relative_error < 1e-9
    # A cost that falls with density gets a constant of zero.
    assert cost_models.fit_sampled([(64, 64, 0.01, 1.0), (64, 64, 0.1, 0.5)]).per_density == 0.0
    with pytest.raises(ValueError, match="need at least two measurements, got 1"):
        cost_models.fit_sampled(points[:1])


def test_rates_of_a_gpu_are_found_from_its_gathers() -> None:
    truth = outer_plan.CostModel(tile_efficiency=0.3, cache_bandwidth=2e12, memory_bandwidth=1e12, launch=4e-6)
    entries = []
    for density, n in ((0.001, 4096), (0.01, 4096), (0.03, 2048)):
        k, tiles = int(density * n * n), int(density * 20 * n * n / 4096)
        problem = outer_plan.Problem(k, n, n, 2048, torch.bfloat16)
        seconds = {
            "dense": outer_plan.dense_seconds(problem, truth),
            "entries": outer_plan.entries_seconds(problem, truth),
            "compact": outer_plan.compact_seconds(problem, (64, 64), tiles, truth),
        }
        common = {"k": k, "rows": n, "cols": n, "tokens": 2048, "dtype": "bfloat16", "tile_shape": [64, 64]}
        entries += [
            {**common, "op": f"gather {method}", "method": method, "tiles": tiles, "seconds": [value]}
            for method, value in seconds.items()
        ]
    entries.append({**common, "op": "gather dense", "failed": "out of memory"})
    rates = cost_models.fit_rates(entries, {"bfloat16": truth.half_flops})
    assert rates["mean_factor"] < 1.05 and rates["cache_bandwidth"] == pytest.approx(2e12, rel=0.1)
    assert "CostModel(half_flops=6e+14" in cost_models.describe_rates(rates)
    assert cost_models.fit_rates([], {}) == {}
