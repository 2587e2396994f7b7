"""Step time and memory of small random Llamas as density, width and tokens grow.

One size is varied at a time; the others stay at the middle of their range. Deltas lie where the profile of SmolLM2's
gradients puts them and never move; LoRA gets the rank whose number of trained values comes nearest.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .bases import BaseSpec, LlamaShape
from .environment import add_output_argument, save
from .stepping import LORA, LOWER_BOUND, AloneSpec, Failures, in_own_process, print_times, set_up, step_seconds, warm_up
from .timing import Clock
from .variants import Budget

DENSITIES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
WIDTHS = (256, 512, 1024, 2048)
TOKENS = (128, 256, 512, 1024, 2048)
SPIEL = "SpIEL-AG, profile indices"
DENSE = "dense formula"
VARIANTS = (LOWER_BOUND, LORA, SPIEL, DENSE)
_SEQUENCE = 128
_LAYERS = 2
_VOCABULARY = 512


@dataclass(frozen=True)
class Point:
    """Sizes of one model and batch; `grows` names the size that is varied."""

    grows: str
    density: float = 0.01
    width: int = 512
    tokens: int = 512

    def base(self) -> BaseSpec:
        heads = max(1, self.width // 64)
        shape = LlamaShape(self.width, self.width * 11 // 4, _LAYERS, heads, heads, _VOCABULARY)
        return BaseSpec(shape=shape)

    def batch(self) -> tuple[int, int]:
        """Number of sequences, and tokens of each."""
        sequence = min(_SEQUENCE, self.tokens)
        return self.tokens // sequence, sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--densities", nargs="+", type=float, default=list(DENSITIES))
    add("--widths", nargs="+", type=int, default=list(WIDTHS))
    add("--tokens", nargs="+", type=int, default=list(TOKENS))
    add("--repetitions", type=int, default=7)
    add("--no-memory", action="store_true", help="leave out the processes that measure memory")
    add("--budget-seconds", type=float, default=None, help="begin no further point after so many seconds")
    add("--name", default="scaling_cpu", help="name of the result file")
    add_output_argument(parser)


def points(args: argparse.Namespace) -> Iterator[Point]:
    yield from (Point("density", density=density) for density in args.densities)
    yield from (Point("width", width=width) for width in args.widths)
    yield from (Point("tokens", tokens=tokens) for tokens in args.tokens)


def measure(point: Point, repetitions: int, memory: bool) -> dict[str, Any]:
    """Measure the seconds per step and the peak memory of every variant at one point."""
    spec, failures = point.base(), Failures()
    base = spec.build()
    budget = Budget.of_density(base, point.density)
    batches = spec.batches(*point.batch())
    runs = set_up(lambda: copy.deepcopy(base), VARIANTS, budget, failures)
    warm_up(runs, batches, failures)
    seconds = step_seconds(runs, batches, repetitions)
    trainable = {name: run.trainable for name, run in runs.items()}
    del runs
    gc.collect()
    result = {**asdict(point), "rank": budget.rank, "trainable": trainable, "seconds": seconds, "failed": failures}
    if memory:
        names = [name for name in VARIANTS if name != DENSE]
        result["memory"] = {name: in_own_process(AloneSpec(spec, name, budget, *point.batch())) for name in names}
    title = f"{point.grows}: d={point.density:.1%}, width {point.width}, {point.tokens} tokens"
    print_times(title, seconds, failures)
    return result


def run(args: argparse.Namespace) -> None:
    results: list[dict[str, Any]] = []
    clock, path = Clock(args.budget_seconds), None
    for point in points(args):
        if clock.expired():
            print(f"the budget of {args.budget_seconds:.0f} s is used up")
            break
        results.append(measure(point, args.repetitions, not args.no_memory))
        path = save(args.name, {"results": results}, args.output, "cpu")
    print(f"-> {path}")
