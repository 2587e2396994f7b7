"""Measures one operation of `spiel_kernels` on one problem, beside its dense formula and the floor of the device.

The floor is the time that no implementation can beat: the larger of the bytes it must move over the measured copy
bandwidth, and its FLOPs over the measured rate of matrix products.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..environment import failure
from ..index_sets import draw_index_set
from ..timing import Action, Clock, DeviceTimer, interleave, median, wall_seconds

_REPETITIONS = 7


@dataclass(frozen=True)
class Floors:
    """Rates of a device, measured in the same process as the operations.

    Attributes:
        bytes_per_second: of a large copy, reads and writes together.
        flops_per_second: of a large matrix product, by dtype name.
    """

    bytes_per_second: float
    flops_per_second: dict[str, float]

    def seconds(self, nbytes: float, flops: float, dtype: str) -> float:
        """The floor in seconds: the larger of both times, as copying and computing can overlap."""
        return max(nbytes / self.bytes_per_second, flops / self.flops_per_second[dtype] if flops else 0.0)

    def to_json(self) -> dict[str, Any]:
        return {"bytes_per_second": self.bytes_per_second, "flops_per_second": self.flops_per_second}


def copy_rate(timer: DeviceTimer, nbytes: int) -> float:
    """Measure a copy of `nbytes`; returns bytes read and written per second."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = median([timer.seconds(lambda: target.copy_(source)) for _ in range(_REPETITIONS)])
    return 2 * nbytes / seconds


def product_rate(timer: DeviceTimer, size: int, dtype: torch.dtype) -> float:
    """Measure the product of two random square matrices; returns FLOP/s."""
    a, b = (torch.randn(size, size, device=timer.device).to(dtype) for _ in range(2))
    out = a @ b
    seconds = median([timer.seconds(lambda: torch.mm(a, b, out=out)) for _ in range(_REPETITIONS)])
    return 2 * size**3 / seconds


def measure_floors(device: torch.device, dtypes: Sequence[str], tiny: bool = False) -> Floors:
    """Measure the rates of a device.

    Args:
        dtypes: names ("float32", "bfloat16") whose matrix product rate is wanted.
        tiny: small operands, to try the benchmark itself.
    """
    timer = DeviceTimer(device)
    on_gpu = device.type == "cuda"
    nbytes = 2**20 if tiny else 2**30 if on_gpu else 2**28
    size = 128 if tiny else 8192 if on_gpu else 1024
    rates = {name: product_rate(timer, size, getattr(torch, name)) for name in dtypes}
    return Floors(copy_rate(timer, nbytes), rates)


_MAX_REPETITIONS = 30


@dataclass(frozen=True)
class Case:
    """One operation on one problem.

    Attributes:
        op: a key of `registry.OPERATIONS`.
        rows, cols: of the weight.
        density: of the index set.
        tokens: rows of the operands of a weight gradient.
        dtype: of weights and operands ("float32", "bfloat16").
        indices: "profile" or "uniform".
    """

    op: str
    rows: int
    cols: int
    density: float
    tokens: int = 512
    dtype: str = "float32"
    indices: str = "profile"

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def k(self) -> int:
        return max(1, round(self.density * self.numel))

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        return (
            f"{self.op:18} {self.rows:5}x{self.cols:<5} d={self.density:<6.2%} N={self.tokens:<5} {self.dtype:8} "
            f"{self.indices:7}"
        )


@dataclass
class Prepared:
    """An operation whose operands are allocated, ready to be timed.

    Attributes:
        run: the operation.
        dense: the dense formula with the same result.
        nbytes, flops: the least that every implementation must move and compute.
        error: distance between the results of `run` and `dense` (0: equal), or None if they cannot be compared.
        notes: further entries of the result, such as the method chosen.
    """

    run: Action
    dense: Action | None
    nbytes: float
    flops: float = 0.0
    error: Callable[[Any, Any], float] | None = None
    notes: dict[str, Any] = field(default_factory=dict)


class Bench:
    """Measures cases on one device; consecutive cases on the same problem share its index set."""

    def __init__(self, device: torch.device, floors: Floors, seconds_per_case: float = 1.0) -> None:
        self.device = device
        self.floors = floors
        self.seconds_per_case = seconds_per_case
        self.timer = DeviceTimer(device)
        self._drawn: dict[tuple[Any, ...], Tensor] = {}

    def index_set(self, case: Case) -> Tensor:
        """The index set of a case; the same for all operations."""
        key = (case.indices, case.rows, case.cols, case.k)
        if key not in self._drawn:
            self._drawn = {key: draw_index_set(*key, seed=0, device=self.device)}
        return self._drawn[key]

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        generator = torch.Generator(device=self.device).manual_seed(seed)
        return torch.randn(*shape, device=self.device, generator=generator).to(dtype)

    def _peak_bytes(self, name: str, action: Action) -> dict[str, int]:
        """Bytes that an operation allocates at its peak, with its result; empty on a CPU."""
        if self.device.type != "cuda":
            return {}
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        action()
        return {name: torch.cuda.max_memory_allocated(self.device) - before}

    def measure(self, case: Case, prepare: Callable[[Bench, Case], Prepared]) -> dict[str, Any]:
        """Time an operation and its dense formula in turn; an exception becomes a failed result.

        Returns:
            The case, ``k``, ``seconds``, ``dense_seconds``, ``floor_seconds``, ``error`` and notes; or ``failed``.
        """
        entry = {**dataclasses.asdict(case), "k": case.k}
        try:
            return entry | self._measure(case, prepare(self, case))
        except Exception as error:
            lines = traceback.format_exc().strip().splitlines()
            return entry | {"failed": failure(error), "traceback": lines[-12:]}

    def _measure(self, case: Case, prepared: Prepared) -> dict[str, Any]:
        actions = {"seconds": prepared.run}
        result = prepared.run()
        notes = dict(prepared.notes)
        if prepared.dense is not None:
            actions["dense_seconds"] = prepared.dense
            expected = prepared.dense()
            if prepared.error is not None:
                notes["error"] = float(prepared.error(result, expected))
            del expected
        del result
        for name, action in actions.items():
            notes |= self._peak_bytes(name.replace("seconds", "peak_bytes"), action)
        once = sum(wall_seconds(action, self.device) for action in actions.values())
        repetitions = int(min(_MAX_REPETITIONS, max(3, self.seconds_per_case / max(once, 1e-6))))
        times = interleave(actions, repetitions, self.device, measure=self.timer.seconds)
        floor = self.floors.seconds(prepared.nbytes, prepared.flops, case.dtype)
        return {**times, "floor_seconds": floor, "bytes": prepared.nbytes, "flops": prepared.flops, **notes}


def describe(entry: dict[str, Any]) -> str:
    """One line for a measured case."""
    case = Case(**{f.name: entry[f.name] for f in dataclasses.fields(Case)})
    if "failed" in entry:
        return f"{case} failed: {entry['failed'][:100]}"
    seconds = median(entry["seconds"])
    line = f"{case} {seconds * 1e3:9.3f} ms  {seconds / entry['floor_seconds']:7.2f} x floor"
    if "dense_seconds" in entry:
        line += f"  {seconds / median(entry['dense_seconds']):6.3f} x dense"
    if entry.get("error") is not None:
        line += f"  error {entry['error']:.1e}"
    return line


def measure_all(
    bench: Bench,
    cases: list[Case],
    operations: dict[str, Callable[[Bench, Case], Prepared]],
    clock: Clock | None = None,
    keep: Callable[[list[dict[str, Any]]], None] | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """Measure cases in order until the clock runs out; returns the results and how many cases were left out.

    Args:
        keep: called with the results so far after each case.
    """
    results: list[dict[str, Any]] = []
    for number, case in enumerate(cases):
        if clock is not None and clock.expired():
            return results, len(cases) - number
        results.append(bench.measure(case, operations[case.op]))
        print(describe(results[-1]), flush=True)
        if keep is not None:
            keep(results)
    return results, 0
