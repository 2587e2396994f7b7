"""Operations of `spiel_kernels` against their dense formulas and against the floor, across densities and shapes.

The floor is the larger of bytes over the measured copy bandwidth and FLOPs over the measured matrix product rate.
Prints the constants of the cost models by which the gather is chosen, on a CPU and on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from ..environment import add_output_argument, save, two_sizes
from ..index_sets import INDEX_SETS
from ..timing import Clock
from .cost_models import describe_rates, fit_rates, fits
from .measure import Bench, Case, measure_all, measure_floors
from .registry import OPERATIONS

SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 4096), (11008, 4096))
DENSITIES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
TOKENS = (512, 2048)
DTYPES = ("float32", "bfloat16")
GATHERS = ("gather", "gather sampled", "gather dense")
# Operations whose time depends on the number of tokens; that of the others depends on the index set only.
_OF_TOKENS = (*GATHERS, "gather compact", "gather entries", "select")
_LARGE = 1024 * 1024
_FEW_DENSITIES = (0.005, 0.01, 0.05)
# Selection computes the whole product, so density changes its time little.
_ONE_DENSITY = (0.01,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ops", nargs="+", choices=list(OPERATIONS), help="by default all that run on a CPU")
    add("--shapes", nargs="+", type=two_sizes, default=list(SHAPES), metavar="ROWSxCOLS")
    add("--densities", nargs="+", type=float, default=list(DENSITIES))
    add("--tokens", nargs="+", type=int, default=list(TOKENS))
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--indices", nargs="+", choices=INDEX_SETS, default=["profile"])
    add("--every", action="store_true", help="every combination; by default, large or slow cases have fewer densities")
    add("--seconds", type=float, default=0.8, help="time spent on repetitions of one case")
    add("--budget-seconds", type=float, default=None, help="begin no further case after so many seconds")
    add("--device", default="cpu")
    add("--name", default=None, help="name of the result file")
    add_output_argument(parser)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The cases to be measured, the most informative first."""
    names = args.ops or [name for name in OPERATIONS if name not in ("gather compact", "gather entries")]
    for tokens, dtype, kind in itertools.product(args.tokens, args.dtypes, args.indices):
        # Operations on one index set follow each other: drawing it takes longer than most of them.
        for (rows, cols), density, name in itertools.product(args.shapes, args.densities, names):
            if name not in _OF_TOKENS and tokens != args.tokens[0]:
                continue
            if density in _densities(args, name, rows * cols, tokens, dtype):
                yield Case(name, rows, cols, density, tokens, dtype, kind)


def _densities(args: argparse.Namespace, name: str, numel: int, tokens: int, dtype: str) -> list[float]:
    if args.every:
        return args.densities
    allowed: tuple[float, ...] = DENSITIES
    if name == "select":
        allowed = _ONE_DENSITY
    elif name not in GATHERS or numel > _LARGE or dtype != "float32":
        allowed = _FEW_DENSITIES
    if numel * tokens > _LARGE * 10_000 or (numel > _LARGE and dtype != "float32"):
        allowed = _ONE_DENSITY
    return [density for density in args.densities if density in allowed or density not in DENSITIES]


def run(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    tiny = max(rows * cols for rows, cols in args.shapes) <= 2**16
    floors = measure_floors(device, args.dtypes, tiny)
    print(f"copy {floors.bytes_per_second / 1e9:.1f} GB/s, " + _rates(floors.flops_per_second), flush=True)
    bench = Bench(device, floors, args.seconds)
    name = args.name or f"ops_{device.type}"

    def keep(results: list[dict[str, Any]]) -> None:
        save(name, {"floors": floors.to_json(), "results": results}, args.output, args.device)

    results, left_out = measure_all(bench, list(cases(args)), OPERATIONS, Clock(args.budget_seconds), keep)
    if left_out:
        print(f"{left_out} cases left out: the budget of {args.budget_seconds:.0f} s is used up")
    for (tokens, dtype), fit in fits(results).items():
        print(
            f"sampled gather, {tokens} tokens, {dtype}: cost / dense = {fit.per_size:.0f} (out + in) / (out in) + "
            f"{fit.per_density:.2f} density (relative error {fit.relative_error:.0%} over {fit.points} cases)"
        )
    rates = fit_rates(results, floors.flops_per_second) if device.type == "cuda" else {}
    if rates:
        print(describe_rates(rates))
    print(f"-> {args.output / name}.json")


def _rates(flops: dict[str, float]) -> str:
    return ", ".join(f"{name} products {rate / 1e9:.0f} GFLOP/s" for name, rate in flops.items())
