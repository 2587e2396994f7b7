"""Finds the ranks that train a delta together, averages gradients under FSDP2, and refuses DeepSpeed's ZeRO."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from ..call_stack import live_objects
from ..delta import AdapterRun, SparseDelta
from ..sharding import is_plain, refuse_fsdp1, sharding_group
from .agreement import Ranks, check_same

# The ranks that train a delta together are those of the DistributedDataParallel wrapper that its gradients went
# through.
#
# A process group alone says nothing: every rank may train a model of its own, or only one rank may train. So wrappers
# are noticed as they are built, by PyTorch's public hook on the registration of submodules, and their forward passes
# are counted. A step without a forward pass of the wrapper, as after unwrapping the model, concerns this process
# alone. A model whose weights FSDP2 has spread over ranks is always run by all of them.


_handles: list[Any] = []


class _Wrapped:
    """Forward passes of one wrapper, and how many there were when each delta was last stepped.

    Attributes:
        deltas: the deltas whose gradients the wrapper averages.
        forwards: its forward passes with gradients so far.
        stepped: how many there were when a delta was last stepped.
    """

    def __init__(self, deltas: Iterable[SparseDelta]) -> None:
        self.deltas = weakref.WeakSet(deltas)
        self.forwards = 0
        self.stepped: weakref.WeakKeyDictionary[SparseDelta, int] = weakref.WeakKeyDictionary()

    def is_in_use(self, delta: SparseDelta) -> bool:
        return delta in self.deltas and self.forwards > self.stepped.get(delta, 0)


_WRAPPED: weakref.WeakKeyDictionary[DistributedDataParallel, _Wrapped] = weakref.WeakKeyDictionary()


def install() -> None:
    """Notice wrappers as they are built; registers its hook once per process."""
    if not _handles:
        _handles.append(register_module_module_registration_hook(_on_registration))


def ranks_of(delta: SparseDelta) -> Ranks | None:
    """The ranks that take part in the step in progress of this delta; None if this process trains it alone."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    if is_chosen(delta):
        group = delta.run.record.ranks
    else:
        group = sharding_group(delta)
        if group is None:
            group = next((wrapper.process_group for wrapper, state in _in_use(delta)), None)
    return Ranks(group) if group is not None and dist.get_world_size(group) > 1 else None


def averages_itself(delta: SparseDelta) -> bool:
    """Whether this package has to average the delta's gradients, because no wrapper does."""
    return sharding_group(delta) is not None and not is_chosen(delta)


def is_chosen(delta: SparseDelta) -> bool:
    """Whether the user has said which ranks train the delta together."""
    ranks = delta.run.record.ranks
    return not (isinstance(ranks, str) and ranks == "auto")


def note_step(deltas: Iterable[SparseDelta]) -> None:
    """Note that the forward passes so far belong to finished steps of these deltas."""
    for delta in deltas:
        for state in _WRAPPED.values():
            if delta in state.deltas:
                state.stepped[delta] = state.forwards


def set_data_parallel_group(model: nn.Module, group: Any | Literal["auto"]) -> None:
    """Set the ranks that train the deltas of a model together; only needed without DistributedDataParallel and FSDP2.

    Args:
        model: any module that contains SpIEL layers.
        group: a process group whose ranks average their gradients, by whatever means, before every optimizer step, and
            all take every step; None: this process trains alone, whatever wraps the model; "auto", the default: the
            ranks over which FSDP2 spreads the base weights, or those of the `DistributedDataParallel` wrapper whose
            forward pass was run.

    Raises:
        ValueError: the model has no SpIEL deltas, or `group` is something else.
    """
    runs = {module.run for module in model.modules() if isinstance(module, SparseDelta)}
    if not runs:
        raise ValueError("the model has no SpIEL deltas: add the adapter (get_peft_model) first")
    if isinstance(group, str) and group != "auto":
        raise ValueError(f"group must be a torch.distributed process group, None or 'auto', got {group!r}")
    if group is not None and not isinstance(group, (str, getattr(dist, "ProcessGroup", str))):
        raise ValueError(f"group must be a torch.distributed process group, None or 'auto', got {group!r}")
    for run in runs:
        run.record.ranks = group


def _in_use(delta: SparseDelta) -> list[tuple[DistributedDataParallel, _Wrapped]]:
    return [(wrapper, state) for wrapper, state in _WRAPPED.items() if state.is_in_use(delta)]


def _on_registration(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if name == "module" and isinstance(module, DistributedDataParallel) and submodule is not None:
        _adopt(module, submodule)
    elif name == "_fsdp_wrapped_module" and submodule is not None:
        refuse_fsdp1(module, submodule)


def _adopt(wrapper: DistributedDataParallel, wrapped: nn.Module) -> None:
    if _watch(wrapper, wrapped):
        wrapper.register_forward_pre_hook(_count_forward)


def _watch(wrapper: DistributedDataParallel, wrapped: nn.Module) -> bool:
    ignored = set(getattr(wrapped, "_ddp_params_and_buffers_to_ignore", ()))
    deltas = [
        module
        for name, module in wrapped.named_modules()
        if isinstance(module, SparseDelta) and module.values.requires_grad and f"{name}.values" not in ignored
    ]
    if not deltas:
        return False
    _WRAPPED[wrapper] = _Wrapped(deltas)
    wrapper.join_hook = _refuse_to_join  # type: ignore[method-assign]
    return True


def _refuse_to_join(**kwargs: Any) -> Any:
    """Stands in for a wrapper's `join_hook`, which `torch.distributed.algorithms.Join` calls as its context is made."""
    raise RuntimeError(
        "SpIEL deltas cannot be trained inside torch.distributed.algorithms.Join: a rank that has run out of batches "
        "takes no steps, so it cannot agree with the others on theirs. Give every rank as many batches: "
        "drop_last=True, or even_batches=True of accelerate's dataloaders"
    )


@torch.compiler.disable
def _count_forward(wrapper: nn.Module, args: Any) -> None:
    if not isinstance(wrapper, DistributedDataParallel) or not torch.is_grad_enabled():
        return
    if wrapper in _WRAPPED or _watch(wrapper, wrapper.module):  # a copy has the hook, but was never registered
        _WRAPPED[wrapper].forwards += 1


# Under FSDP2 the base weights are spread over ranks and the deltas are whole on each. DistributedDataParallel
# averages the gradients of the parameters that it wraps, FSDP2 those that it shards; the gradients of deltas are
# averaged here, at the end of every backward pass, so that clipping sees the averages. `no_sync` needs no support:
# averaging an average again changes nothing, so micro-batches may be averaged one by one.


def queue_average(delta: SparseDelta) -> None:
    """Have the gradients of the delta's run averaged at the end of the backward pass in which this is called.

    Does nothing unless FSDP2 shards the base weight and `set_data_parallel_group` has not been called.
    """
    if not averages_itself(delta):
        return
    task = torch._C._current_graph_task_id()
    run = delta.run
    if run.record.averaging == task:
        return
    run.record.averaging = task
    ranks = ranks_of(delta)
    if ranks is not None:
        Variable._execution_engine.queue_callback(lambda: _average_run(run, ranks))


def _average_run(run: AdapterRun, ranks: Ranks) -> None:
    run.record.averaging = None
    # All of them, also those that this rank's data did not reach: others may have reached them.
    deltas = [d for d in run.deltas() if d.values.requires_grad and sharding_group(d) is ranks.group]
    for delta in deltas:
        _check_plain(delta)
    with torch.no_grad():
        if not run.record.ranks_compared:
            check_same(ranks, deltas)
            run.record.ranks_compared = True
        average_gradients(deltas, ranks)


def refuse_mixed_groups(optimizer: torch.optim.Optimizer, deltas: list[SparseDelta]) -> None:
    """Refuse an optimizer that would hand whole and sharded parameters of one group to one kernel.

    Raises:
        TypeError: names the optimizer and the setting to change; called before it steps.
    """
    whole = {id(delta.values) for delta in deltas if sharding_group(delta) is not None}
    if not whole:
        return
    for group in optimizer.param_groups:
        at_once = [name for name in ("fused", "foreach") if group.get(name)]
        if not at_once or not any(id(p) in whole for p in group["params"]):
            continue
        if not all(is_plain(p) for p in group["params"]):
            raise TypeError(
                f"{type(optimizer).__name__} with {at_once[0]}=True steps all parameters of a group at once, but FSDP2 "
                "shards some of this group's (modules_to_save, biases) and deltas are whole: set fused=False and "
                "foreach=False (Trainer: optim='adamw_torch'), or put the deltas into a parameter group of their own"
            )


def average_gradients(deltas: list[SparseDelta], ranks: Ranks) -> None:
    """Replace the gradient of every delta, in place, by its mean over the ranks; one that no rank has stays None."""
    reached = torch.tensor([d.values.grad is not None for d in deltas], device=deltas[0].values.device).to(torch.int64)
    grads = [torch.zeros_like(d.values) if d.values.grad is None else d.values.grad.contiguous() for d in deltas]
    ranks.add_up([*grads, reached])
    torch._foreach_div_(grads, ranks.size)
    # A rank with a gradient of its own need not wait for the device to know that there is one.
    anywhere = reached.tolist() if any(d.values.grad is None for d in deltas) else None
    for place, (delta, grad) in enumerate(zip(deltas, grads, strict=True)):
        if delta.values.grad is not None or (anywhere is not None and anywhere[place]):
            _give(delta.values, grad)


def _give(values: Tensor, grad: Tensor) -> None:
    if values.grad is not grad:
        values.grad = grad


def _check_plain(delta: SparseDelta) -> None:
    if not is_plain(delta.values):
        raise RuntimeError(
            f"{delta.module_name}: its deltas were sharded by FSDP2; this version of PyTorch needs to be told not to: "
            "pass ignored_params={p for n, p in model.named_parameters() if '.spiel_delta.' in n} to fully_shard"
        )


# DeepSpeed's engines are recognized without importing DeepSpeed. ZeRO's optimizers step flat buffers of their own,
# which hold pieces of many parameters together, so the entries of a delta cannot be moved in them. A cycle would not
# run at all, or every rank would run its own.


_ENGINES = "deepspeed.runtime.engine"
_INSTEAD = (
    "use FSDP2 (Accelerate: fsdp_version=2, see examples/accelerate/fsdp2.yaml) to spread the base model over GPUs, or "
    "DistributedDataParallel (examples/accelerate/ddp.yaml) where it fits on each"
)


def refuse_deepspeed(delta: SparseDelta, averaged_by_user: bool) -> None:
    """Refuse a DeepSpeed engine that keeps the deltas in flat buffers; looks once per run, in a backward pass.

    Args:
        delta: its values are about to get their gradient.
        averaged_by_user: whether the user has named the ranks that train together. An engine that leaves the optimizer
            as it is (stage 0 in float32) is allowed then.

    Raises:
        RuntimeError: a DeepSpeed engine trains the delta; nothing was changed then.
    """
    if delta.run.record.engine_checked or _ENGINES not in sys.modules:
        return
    engine = _engine_of(delta)
    if engine is None:
        delta.run.record.engine_checked = True
        return
    stage = engine.zero_optimization_stage()
    if _keeps_parameters(engine, delta):
        if averaged_by_user:
            delta.run.record.engine_checked = True
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
    return next(
        (engine for engine in live_objects(engine_class) if any(module is delta for module in engine.modules())), None
    )


def _keeps_parameters(engine: Any, delta: SparseDelta) -> bool:
    """Whether the engine's optimizer steps the very parameter of the delta."""
    groups = getattr(getattr(engine, "optimizer", None), "param_groups", ())
    return any(parameter is delta.values for group in groups for parameter in group["params"])
