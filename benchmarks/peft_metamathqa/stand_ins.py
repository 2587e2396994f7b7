"""Stands in for what the harness needs and a CPU does not have. A rehearsal runs this file before the harness."""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import peft.utils
import torch
from transformers import AutoModelForCausalLM


class Device(str):
    """The string "cpu", which also equals "cuda": the harness refuses any device but CUDA's and XPU's."""

    def __eq__(self, other: object) -> bool:
        return other == "cuda" or str.__eq__(self, other)

    __hash__ = str.__hash__


class KeptFolder:
    """`tempfile.TemporaryDirectory` with `delete=False`, which Python has from 3.12 on."""

    def __init__(self, **options: Any) -> None:
        self.name = tempfile.mkdtemp()

    def __enter__(self) -> str:
        return self.name

    def __exit__(self, *error: object) -> None:
        pass


load = AutoModelForCausalLM.from_pretrained
AutoModelForCausalLM.from_pretrained = lambda **options: load(**options | {"device_map": "cpu"})
peft.utils.infer_device = lambda: Device("cpu")
torch.cpu.get_device_name = lambda index: "CPU"
torch.cpu.empty_cache = lambda: None
for name in ("manual_seed_all", "reset_peak_memory_stats"):
    setattr(torch.cpu, name, lambda *arguments: None)
for name in ("max_memory_reserved", "memory_allocated", "memory_reserved"):
    setattr(torch.cpu, name, lambda: 0)
if sys.version_info < (3, 12):
    tempfile.TemporaryDirectory = KeptFolder
