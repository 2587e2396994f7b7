"""What no implementation can beat: bytes over the measured copy bandwidth, FLOPs over the measured product rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .timing import DeviceTimer, median

_REPETITIONS = 7


@dataclass(frozen=True)
class Floors:
    """Rates of a device, measured in the process whose operations are compared with them.

    Attributes:
        bytes_per_second: of a large copy, reads and writes together.
        flops_per_second: of a large matrix product, by dtype name.
    """

    bytes_per_second: float
    flops_per_second: dict[str, float]

    def seconds(self, nbytes: float, flops: float, dtype: str) -> float:
        """The larger of the two times; where both matter, they can overlap."""
        return max(nbytes / self.bytes_per_second, flops / self.flops_per_second[dtype] if flops else 0.0)

    def to_json(self) -> dict[str, Any]:
        return {"bytes_per_second": self.bytes_per_second, "flops_per_second": self.flops_per_second}


def copy_rate(timer: DeviceTimer, nbytes: int) -> float:
    """Bytes per second, read and written, of a copy of `nbytes`."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = median([timer.seconds(lambda: target.copy_(source)) for _ in range(_REPETITIONS)])
    return 2 * nbytes / seconds


def product_rate(timer: DeviceTimer, size: int, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices of random numbers."""
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
