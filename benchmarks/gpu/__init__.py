"""Everything that needs a GPU, in parts that can be resumed: single operations, training steps, memory.

Every part saves its result as it goes. A part whose result exists is skipped; a part that failed is tried again. Parts
run in a process of their own, in order of importance, each with a share of the time. At the end a table is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from ..environment import add_output_argument
from ..timing import Clock
from . import operations, training
from .parts import Part, Place, run_parts, supervise
from .table import gpu_table

PARTS = (
    Part("machine", 2, operations.machine),
    Part("dequantize", 5, operations.dequantize),
    Part("whole_7b_nf4", 22, training.whole_7b_nf4),
    Part("steps_7b_nf4", 18, training.steps_7b_nf4),
    Part("steps_7b_bf16", 14, training.steps_7b_bf16),
    Part("gather", 10, operations.gather),
    Part("growth", 5, operations.growth),
    Part("share", 7, training.share),
    Part("steps_13b_nf4", 8, training.steps_13b_nf4),
    Part("one_layer", 1, training.one_layer),
    Part("single_precision", 2, operations.single_precision),
    Part("whole_7b_bf16", 16, training.whole_7b_bf16),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--parts", nargs="+", choices=[part.name for part in PARTS], help="all by default")
    add("--budget-seconds", type=float, default=520.0, help="for all parts together")
    add("--force", action="store_true", help="measure parts again whose result exists")
    add("--device", default="cuda")
    add("--tiny", action="store_true", help="small sizes, to try the benchmark itself (also with --device cpu)")
    add("--in-process", action="store_true", help="run the parts in this process, without supervision")
    add_output_argument(parser)


def _command(args: argparse.Namespace, parts: Sequence[Part], seconds: float) -> list[str]:
    """The command line of the process that runs parts under the supervision of this one."""
    command = [sys.executable, "-m", "benchmarks", "gpu", "--in-process", "--force", "--device", args.device]
    command += ["--budget-seconds", f"{seconds:.1f}", "--output", str(args.output.resolve())]
    command += ["--tiny"] * args.tiny
    return [*command, "--parts", *(part.name for part in parts)]


def run(args: argparse.Namespace) -> None:
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU found; to try the benchmark itself on a CPU: --device cpu --tiny")
    clock = Clock(args.budget_seconds)
    place = Place(args.output, "gpu_tiny" if args.tiny else "gpu", args.device, args.tiny)
    chosen = [part for part in PARTS if args.parts is None or part.name in args.parts]
    parts = [part for part in chosen if args.force or not place.is_done(part.name)]
    for part in chosen:
        if part not in parts:
            print(f"== {part.name}: skipped, its result exists (--force measures again)", flush=True)
    if args.in_process:
        run_parts(parts, place, clock)
        return
    supervise(parts, place, clock, lambda pending, seconds: _command(args, pending, seconds))
    print(gpu_table({part.name: place.result(part.name) for part in PARTS}))
