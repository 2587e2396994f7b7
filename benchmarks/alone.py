"""Training as users run it, one variant in a process of its own: peak memory, and seconds of every step.

On a GPU peak memory is what the allocator counts, so no process is needed for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import windows
from .bases import BaseSpec
from .variants import GROWTH, Budget, TrainingRun, build, cycling_run

_MIB = 2**20


@dataclass(frozen=True)
class AloneSpec:
    """One variant on one base, to be measured alone.

    Attributes:
        base: the frozen model.
        variant: a name of `variants.VARIANTS`.
        budget: how much is trained.
        batch_size, tokens: shape of the batches.
        cycles: 0 measures memory only, through the warm-up. Otherwise every step is timed, through the first close and
            so many whole cycles, and SpIEL runs with its default cycle.
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
    """Train the variant in a fresh process.

    Returns:
        Of peak resident memory, in MiB: ``peak_mib``, and ``loaded_mib`` (resident before the variant is set up:
        interpreter, libraries and base model); ``trainable``, the number of trained values. With ``spec.cycles`` 0
        also ``steady_mib`` (the peak of a step after the warm-up, between SpIEL's windows) and ``step_peaks_mib`` (of
        each step, set-up included in the first); else what `windows.measure` returns. Or ``error`` alone.
    """
    command = [sys.executable, "-m", "benchmarks.alone", spec.to_json()]
    folder = Path(__file__).parent.parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {timeout_seconds:.0f} s"}
    if done.returncode != 0:
        return {"error": f"exit status {done.returncode}: {done.stderr.strip()[-2000:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def _status_mib(field: str) -> float:
    """A memory field of this process as the kernel reports it (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no field {field}")


def _forget_peak() -> bool:
    """Start the kernel's peak count anew; False where the system does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _give_back_freed() -> None:
    """What loading a model has freed is not part of training it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _step_peaks(run: TrainingRun, batches: list[Tensor]) -> list[float]:
    """Peak MiB of each step through the warm-up and one more."""
    peaks = []
    for number in range(run.warmup_steps + 1):
        run.step(batches[number % len(batches)])
        peaks.append(_status_mib("VmHWM"))
        _forget_peak()
    return peaks


def measure_here(spec: AloneSpec) -> dict[str, Any]:
    """What `in_own_process` returns, of this very process."""
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
        timed = windows.measure(run, growth, batches, spec.cycles)
        return result | timed | {"peak_mib": _status_mib("VmHWM")}
    peaks = _step_peaks(run, batches)
    return result | {"peak_mib": max(peaks), "steady_mib": peaks[-1], "step_peaks_mib": peaks}


def begin_device_peak(device: torch.device) -> float:
    """Start the allocator's peak count of a GPU anew; returns MiB in use (0 on a CPU)."""
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
