"""Measures training: steps of several variants interleaved, whole cycles, and one variant in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bases import BaseSpec
from .environment import failure
from .timing import Clock, interleave, median, quantile, wall_seconds
from .variants import FIRST_CLOSE, GROWTH, Budget, TrainingRun, build, cycling_run

Failures = dict[str, str]
LORA, LOWER_BOUND = "LoRA", "lower bound"


def set_up(
    make_base: Callable[[], Any], names: Iterable[str], budget: Budget, failures: Failures
) -> dict[str, TrainingRun]:
    """Set up every variant on a base model of its own; errors go to `failures`, by variant."""
    runs = {}
    for name in names:
        try:
            runs[name] = build(name, make_base(), budget)
        except Exception as error:
            failures[name] = failure(error)
    return runs


def warm_up(runs: dict[str, TrainingRun], batches: list[Tensor], failures: Failures, steps: int | None = None) -> None:
    """Take the warm-up steps of every run; a run that fails is removed, and its error goes to `failures`."""
    for name, run in list(runs.items()):
        try:
            for number in range(steps or run.warmup_steps):
                run.step(batches[number % len(batches)])
        except Exception as error:
            failures[name] = failure(error)
            del runs[name], run
            free_memory()


def free_memory() -> None:
    """Collect garbage and empty the cache of the GPU's allocator."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step_seconds(
    runs: Mapping[str, TrainingRun], batches: list[Tensor], repetitions: int, clock: Clock | None = None
) -> dict[str, list[float]]:
    """Time steps of all runs in turn; returns the seconds of every repetition, by variant.

    All variants get the same batches in the same order.
    """
    device = batches[0].device
    counts = dict.fromkeys(runs, 0)

    def action(name: str) -> Callable[[], None]:
        def step() -> None:
            runs[name].step(batches[counts[name] % len(batches)])
            counts[name] += 1

        return step

    return interleave({name: action(name) for name in runs}, repetitions, device, clock)


def print_times(
    title: str,
    seconds: Mapping[str, list[float]],
    failures: Failures,
    references: Sequence[str] = (LORA, LOWER_BOUND),
) -> None:
    """Print median, 20% and 80% quantile of each variant, and its median over those of the references."""
    print(f"{title:28}   median      20%      80% s" + "".join(f"{'/ ' + name:>16}" for name in references))
    medians = {name: median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        ratios = [f"{medians[name] / medians[r]:16.2f}" if r in medians else " " * 16 for r in references]
        low, high = quantile(values, 0.2), quantile(values, 0.8)
        print(f"{name:28} {medians[name]:8.4g} {low:8.4g} {high:8.4g}  {''.join(ratios)}", flush=True)
    for name, reason in failures.items():
        print(f"{name:28} failed: {reason}", flush=True)


REGROW_EVERY = 20  # default of SpIELConfig, as is FIRST_CLOSE; a test compares both


def moving_steps(growth: str | None, steps: int) -> list[int]:
    """Steps, counted from 1, in which SpIEL collects candidates or closes a cycle; empty if `growth` is None."""
    if growth is None:
        return []
    length = FIRST_CLOSE if growth == "accumulated_gradient" else 1
    closes = range(FIRST_CLOSE, steps + 1, REGROW_EVERY)
    return sorted({step for close in closes for step in range(max(1, close - length + 1), close + 1)})


def shares(seconds: list[float], growth: str | None) -> dict[str, float]:
    """Compute the share of training time that windows and closes take, over whole cycles after the first close.

    Args:
        seconds: of the steps of a run from the first one, up to and including a close.

    Returns:
        ``share``: if every step took as long as the median step outside windows, this share of the total time would
        be saved; ``share_of_moving_steps``: the same, if only the steps of windows and closes differed from it.
    """
    moving = set(moving_steps(growth, len(seconds)))
    cycles = {step: value for step, value in enumerate(seconds, start=1) if step > FIRST_CLOSE}
    plain = median([value for step, value in cycles.items() if step not in moving])
    total = sum(cycles.values())
    extra = sum(value - plain for step, value in cycles.items() if step in moving)
    return {
        "share": (total - len(cycles) * plain) / total,
        "share_of_moving_steps": extra / (len(cycles) * plain + extra),
    }


def measure_cycles(
    run: TrainingRun, growth: str | None, batches: list[Tensor], cycles: int, clock: Clock | None = None
) -> dict[str, Any]:
    """Time every step of a run with the default cycle: up to the first close, and `cycles` whole cycles after it.

    Returns:
        ``seconds`` of every step, ``moving_steps`` as `moving_steps` counts them, and what `shares` returns.
    """
    seconds: list[float] = []
    for number in range(FIRST_CLOSE + cycles * REGROW_EVERY):
        ids = batches[number % len(batches)]
        seconds.append(wall_seconds(lambda ids=ids: run.step(ids), ids.device))
        since_close = len(seconds) - FIRST_CLOSE
        if since_close > 0 and since_close % REGROW_EVERY == 0 and clock is not None and clock.expired():
            break
    return {"seconds": seconds, "moving_steps": moving_steps(growth, len(seconds)), **shares(seconds, growth)}


_MIB = 2**20


@dataclass(frozen=True)
class AloneSpec:
    """Describes one variant on one base that a process of its own measures.

    Attributes:
        base: the frozen model.
        variant: a name of `variants.VARIANTS`.
        budget: how much is trained.
        batch_size, tokens: shape of the batches.
        cycles: if 0, only memory is measured, during the warm-up. Otherwise SpIEL runs with its default cycle, and
            every step is timed up to the first close and through this number of whole cycles.
    """

    base: BaseSpec
    variant: str
    budget: Budget
    batch_size: int
    tokens: int
    cycles: int = 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> AloneSpec:
        entry = json.loads(text)
        return AloneSpec(**{**entry, "base": BaseSpec.from_json(entry["base"]), "budget": Budget(**entry["budget"])})


def in_own_process(spec: AloneSpec, timeout_seconds: float = 600.0) -> dict[str, Any]:
    """Train the variant in a new process, as users run it, and return its peak memory and times.

    Returns:
        ``peak_mib``, peak resident memory; ``loaded_mib``, resident memory before the variant is set up (interpreter,
        libraries and base model); ``trainable``, the number of trained values. With ``spec.cycles`` 0 also
        ``steady_mib`` (peak of a step after the warm-up, between SpIEL's windows) and ``step_peaks_mib`` (peak of each
        step, the first with set-up); otherwise what `measure_cycles` returns. If the process fails, only ``error``.
    """
    command = [sys.executable, "-m", "benchmarks.stepping", spec.to_json()]
    folder = Path(__file__).parent.parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {timeout_seconds:.0f} s"}
    if done.returncode != 0:
        return {"error": f"exit status {done.returncode}: {done.stderr.strip()[-2000:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def _status_mib(field: str) -> float:
    """MiB in a memory field of /proc/self/status (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no field {field}")


def _forget_peak() -> bool:
    """Reset the peak memory that the kernel counts for this process; returns False if that is not permitted."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _give_back_freed() -> None:
    """Return freed memory to the system, so that memory which only loading the model needed is not counted."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _step_peaks(run: TrainingRun, batches: list[Tensor]) -> list[float]:
    """Peak MiB of each warm-up step and of one step after them."""
    peaks = []
    for number in range(run.warmup_steps + 1):
        run.step(batches[number % len(batches)])
        peaks.append(_status_mib("VmHWM"))
        _forget_peak()
    return peaks


def measure_here(spec: AloneSpec) -> dict[str, Any]:
    """Measure in this process; returns what `in_own_process` describes."""
    base = spec.base.build()
    batches = spec.base.batches(spec.batch_size, spec.tokens)
    _give_back_freed()
    result: dict[str, Any] = {"loading_left_out": _forget_peak(), "loaded_mib": _status_mib("VmRSS")}
    growth = GROWTH.get(spec.variant)
    if spec.cycles and growth is not None:
        run = cycling_run(growth, base, spec.budget)
    else:
        run = build(spec.variant, base, spec.budget)
    result["trainable"] = run.trainable
    if spec.cycles:
        timed = measure_cycles(run, growth, batches, spec.cycles)
        return result | timed | {"peak_mib": _status_mib("VmHWM")}
    peaks = _step_peaks(run, batches)
    return result | {"peak_mib": max(peaks), "steady_mib": peaks[-1], "step_peaks_mib": peaks}


def begin_device_peak(device: torch.device) -> float:
    """Reset the peak memory that a GPU's allocator counts; returns the MiB in use (0 on a CPU)."""
    gc.collect()
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / _MIB


def device_peak(device: torch.device) -> float:
    """MiB allocated at the peak since `begin_device_peak` (0 on a CPU)."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / _MIB


if __name__ == "__main__":
    print(json.dumps(measure_here(AloneSpec.from_json(sys.argv[1]))))
