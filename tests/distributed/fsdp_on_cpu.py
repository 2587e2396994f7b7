"""Lets Accelerate use its FSDP code on CPUs, which it does only on accelerators."""

from __future__ import annotations

import os
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

_init = AcceleratorState.__init__


def allow_fsdp_on_cpu() -> None:
    """Let every `AcceleratorState` of this process take an FSDP plugin, as on a machine with GPUs."""
    AcceleratorState.__init__ = _init_with_fsdp  # type: ignore[method-assign]


def _init_with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **settings: Any) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **settings)
    if fsdp_plugin is None or self.distributed_type != DistributedType.MULTI_CPU:
        return
    self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if self.mixed_precision != "no":
        fsdp_plugin.set_mixed_precision(self.mixed_precision)
    self.fsdp_plugin = fsdp_plugin


def reset_accelerate() -> None:
    """Reset Accelerate's global state, so that each scenario starts as in a new process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[name]
