"""DeepSpeed: what its engines make of a model, told apart without importing it.

ZeRO's optimizers step flat buffers of their own, pieces of many parameters together, in which no position of a delta
can be found, let alone moved. A cycle would not run at all, or every rank would run its own.
"""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

from ..delta import AdapterRun, SparseDelta

_ENGINES = "deepspeed.runtime.engine"
_INSTEAD = (
    "use FSDP2 (Accelerate: fsdp_version=2, see examples/accelerate/fsdp2.yaml) to spread the base model over GPUs, or "
    "DistributedDataParallel (examples/accelerate/ddp.yaml) where it fits on each"
)
_CHECKED: weakref.WeakSet[AdapterRun] = weakref.WeakSet()


def refuse_deepspeed(delta: SparseDelta, averaged_by_user: bool) -> None:
    """Called in every backward pass before gradients are noted; looks once per run.

    Args:
        delta: about to get its gradient.
        averaged_by_user: the user has named the processes that train together, so an engine that leaves the optimizer
            as it is (stage 0 in float32) will do.

    Raises:
        RuntimeError: a DeepSpeed engine trains the delta; nothing was changed then.
    """
    if delta.run in _CHECKED or _ENGINES not in sys.modules:
        return
    engine = _engine_of(delta)
    if engine is None:
        _CHECKED.add(delta.run)
        return
    stage = engine.zero_optimization_stage()
    if _keeps_parameters(engine, delta):
        if averaged_by_user:
            _CHECKED.add(delta.run)
            return
        raise RuntimeError(
            f"SpIEL under DeepSpeed (ZeRO stage {stage}): call spiel_peft.set_data_parallel_group(model, "
            f"torch.distributed.group.WORLD), so that ranks choose positions together; or {_INSTEAD}"
        )
    raise RuntimeError(
        f"SpIEL does not work under DeepSpeed's ZeRO stage {stage} with {type(engine.optimizer).__name__}, which keeps "
        f"parameters in flat buffers whose entries cannot follow the deltas' positions: {_INSTEAD}"
    )


def _engine_of(delta: SparseDelta) -> Any | None:
    engine_class = getattr(sys.modules[_ENGINES], "DeepSpeedEngine", None)
    if engine_class is None:
        return None
    engines = [found for found in gc.get_objects() if issubclass(type(found), engine_class)]
    return next((engine for engine in engines if any(module is delta for module in engine.modules())), None)


def _keeps_parameters(engine: Any, delta: SparseDelta) -> bool:
    """Whether the engine's optimizer steps the very parameter of the delta."""
    groups = getattr(getattr(engine, "optimizer", None), "param_groups", ())
    return any(parameter is delta.values for group in groups for parameter in group["params"])
