"""Which kernels a step spends its time in."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..timing import Action, wall_seconds

_KERNELS = 30
_NAME_CHARACTERS = 90


def kernel_times(action: Action, device: torch.device) -> dict[str, Any]:
    """Profile one call of an action; on a CPU its operators take the place of kernels.

    Returns:
        ``wall_ms``, of the call, longer than without the profiler; ``device_ms``, in which a kernel runs;
        ``launches``; ``kernels``: name, number of launches and milliseconds of those that take longest.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        wall = wall_seconds(action, device)
    wanted, key = (DeviceType.CUDA, "device") if on_gpu else (DeviceType.CPU, "cpu")
    entries = [
        (event.key[:_NAME_CHARACTERS], event.count, getattr(event, f"self_{key}_time_total"))
        for event in profiler.key_averages()
        if event.device_type == wanted and not event.is_user_annotation
    ]
    entries.sort(key=lambda entry: -entry[2])
    return {
        "wall_ms": wall * 1e3,
        "device_ms": sum(microseconds for *_, microseconds in entries) / 1e3,
        "launches": sum(count for _, count, _ in entries),
        "kernels": [[name, count, microseconds / 1e3] for name, count, microseconds in entries[:_KERNELS]],
    }
