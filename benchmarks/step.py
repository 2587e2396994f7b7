"""Whole training steps of SmolLM2: SpIEL, PEFT LoRA, the dense formula, full fine-tuning and the lower bound.

Parts: `alone` (as users run it: each variant in a process of its own, in turn, timed through a whole cycle), `time`
(seconds per step between SpIEL's windows, many variants in one process, where LoRA is slower than alone), `memory`
(peak resident memory, each variant in a process of its own, through SpIEL's first window and close), `share` (how much
of a run SpIEL's windows and closes take) and `layer` (one linear layer of 4096 x 4096, forward and backward).
"""

from __future__ import annotations

import argparse
import copy
import gc
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spiel_peft.config import DEFAULT_R

from . import layer
from .bases import TINY, BaseSpec, keep_smollm2
from .environment import add_output_argument, save, two_sizes
from .stepping import (
    LORA,
    LOWER_BOUND,
    AloneSpec,
    Failures,
    in_own_process,
    measure_cycles,
    print_times,
    set_up,
    step_seconds,
    warm_up,
)
from .timing import median
from .variants import VARIANTS, Budget, cycling_run

PARTS = ("alone", "time", "memory", "share", "layer")
TIMED = (
    LOWER_BOUND,
    LORA,
    "LoRA, dropout 0.05",
    "SpIEL-AG",
    "SpIEL-AG, uniform indices",
    "SpIEL-MA, SM3",
    "dense formula",
    "full fine-tuning",
)
# Variants whose memory is measured: index sets make no difference to it, dropout a small one.
WEIGHED = (LOWER_BOUND, LORA, "SpIEL-AG", "SpIEL-MA, SM3", "dense formula", "full fine-tuning")

# The methods that a user chooses between.
COMPARED = (LORA, "SpIEL-AG", "SpIEL-MA, SM3")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--all", action="store_true", help="everything: all parts, r = 4 and 16, 4x128 and 4x256 (under an hour)")
    add("--parts", nargs="+", choices=PARTS, default=["time"])
    add("--r", nargs="+", type=int, default=[16], help="ranks whose number of values is trained")
    add("--shapes", nargs="+", type=two_sizes, default=[(4, 128)], metavar="BxT", help="sequences x tokens of a batch")
    add("--variants", nargs="+", choices=list(VARIANTS), metavar="NAME", help=f"out of {' | '.join(VARIANTS)}")
    add("--repetitions", type=int, default=7, help="timed steps per variant (fewer of long batches)")
    add("--cycles", type=int, default=2, help="cycles timed for the share of a run")
    add("--rounds", type=int, default=3, help="processes of each variant for `alone`")
    add("--tiny", action="store_true", help="a tiny random model, to try the benchmark itself")
    add_output_argument(parser)


class _Study:
    """One call of the command: a base model, and the settings that all parts share."""

    def __init__(self, args: argparse.Namespace, spec: BaseSpec) -> None:
        self.args = args
        self.spec = spec
        self.model_name = "tiny" if args.tiny else "smollm2"
        self.base = spec.build()

    def name(self, part: str, r: int, shape: tuple[int, int]) -> str:
        return f"{part}_{self.model_name}_r{r}_{shape[0]}x{shape[1]}"

    def settings(self, r: int, shape: tuple[int, int]) -> dict[str, Any]:
        return {
            "model": self.model_name,
            "r": r,
            "batch_size": shape[0],
            "tokens": shape[1],
            "dtype": self.spec.dtype,
            "data": "random ids" if self.args.tiny else "packed text",
        }

    def save(self, part: str, r: int, shape: tuple[int, int], result: dict[str, Any]) -> None:
        result = {"settings": self.settings(r, shape), **result}
        print(f"-> {save(self.name(part, r, shape), result, self.args.output, 'cpu')}\n", flush=True)

    def time(self, r: int, shape: tuple[int, int]) -> None:
        """Time steps of all variants in this process."""
        failures: Failures = {}
        batches = self.spec.batches(*shape)
        names = self.args.variants or TIMED
        runs = set_up(lambda: copy.deepcopy(self.base), names, Budget.of_rank(r), failures)
        warm_up(runs, batches, failures)
        repetitions = self.args.repetitions if shape[0] * shape[1] <= 512 else max(1, self.args.repetitions * 2 // 3)
        seconds = step_seconds(runs, batches, repetitions)
        trainable = {name: run.trainable for name, run in runs.items()}
        del runs
        gc.collect()
        print_times(f"r={r}, {shape[0]}x{shape[1]} tokens", seconds, failures)
        self.save("step", r, shape, {"seconds": seconds, "trainable": trainable, "failed": failures})

    def alone(self, r: int, shape: tuple[int, int]) -> None:
        """Measure times through one whole cycle and peak memory, in a new process for each variant and round."""
        rounds: list[dict[str, Any]] = []
        for _ in range(self.args.rounds):
            rounds.append({})
            for name in self.args.variants or COMPARED:
                spec = AloneSpec(self.spec, name, Budget.of_rank(r), *shape, cycles=1)
                rounds[-1][name] = entry = in_own_process(spec)
                print(f"{name:28} {_summary(entry)}", flush=True)
        self.save("alone", r, shape, {"rounds": rounds})

    def memory(self, r: int, shape: tuple[int, int], names: Iterable[str]) -> None:
        """Measure the peak memory of every variant, each in a process of its own."""
        measured = {}
        for name in names:
            measured[name] = in_own_process(AloneSpec(self.spec, name, Budget.of_rank(r), *shape))
            print(f"{name:28} {_weighed(measured[name])}", flush=True)
        self.save("memory", r, shape, {"memory": measured})

    def share(self, r: int, shape: tuple[int, int]) -> None:
        """Measure the share of training time that windows and closes take, for both growth criteria."""
        batches = self.spec.batches(*shape)
        result = {}
        for growth in ("accumulated_gradient", "momentum"):
            run = cycling_run(growth, copy.deepcopy(self.base), Budget.of_rank(r))
            result[growth] = measure_cycles(run, growth, batches, self.args.cycles)
            del run
            print(f"{growth:22} moving deltas takes {result[growth]['share']:.1%} of a run", flush=True)
        self.save("share", r, shape, {"growth": result})


def _summary(entry: dict[str, Any]) -> str:
    if "error" in entry:
        return f"failed: {entry['error']}"[:200]
    return f"{median(entry['seconds']):.3f} s per step, peak {entry['peak_mib']:.0f} MiB"


def _weighed(entry: dict[str, Any]) -> str:
    if "error" in entry:
        return f"failed: {entry['error']}"[:200]
    return (
        f"peak {entry['peak_mib']:.0f} MiB, between windows {entry['steady_mib']:.0f}, loaded {entry['loaded_mib']:.0f}"
    )


def run(args: argparse.Namespace) -> None:
    if args.all:
        args.parts, args.r, args.shapes = list(PARTS), [4, 16], [(4, 128), (4, 256)]
    if set(args.parts) - {"layer"}:
        with tempfile.TemporaryDirectory(prefix="spiel-benchmarks-") as folder:
            spec = BaseSpec(shape=TINY) if args.tiny else keep_smollm2(Path(folder))
            _run_model_parts(_Study(args, spec))
    if "layer" in args.parts:
        rows, cols, tokens = (64, 48, 32) if args.tiny else (4096, 4096, 2048)
        result = layer.measure(rows, cols, 0.01, tokens, args.repetitions)
        print_times(f"one layer, {rows}x{cols}, {tokens} tokens", result["seconds"], result["failed"], layer.REFERENCES)
        print(f"-> {save(f'layer_{rows}x{cols}', result, args.output, 'cpu')}")


def _run_model_parts(study: _Study) -> None:
    args = study.args
    for shape in args.shapes:
        for r in args.r:
            if "alone" in args.parts:
                study.alone(r, shape)
            if "time" in args.parts:
                study.time(r, shape)
            if "memory" in args.parts:
                # Memory of the variants that do not depend on r is measured once per shape.
                first = args.variants or [n for n in WEIGHED if r == args.r[-1] or n in (LORA, *WEIGHED[2:4])]
                study.memory(r, shape, first)
    if "share" in args.parts:
        for r in (DEFAULT_R, 16) if args.all else args.r:
            study.share(r, args.shapes[0])
