"""Which ranks train a delta together: those whose DistributedDataParallel wrapper its gradients went through.

A process group alone says nothing: every rank may train a model of its own, or one of them alone. So wrappers are
noticed as they are built, by PyTorch's public hook on the registration of submodules, and their forward passes are
counted: a step without one, as after unwrapping the model, is nobody else's business. A model whose weights FSDP2 has
spread over ranks cannot be run by one of them alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from ..delta import AdapterRun, SparseDelta
from ..sharding import refuse_fsdp1, sharding_group
from .ranks import Ranks

_handles: list[Any] = []


class _Wrapped:
    """What is known of one wrapper.

    Attributes:
        deltas: those whose gradients it averages.
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
# What users have said themselves.
_CHOSEN: weakref.WeakKeyDictionary[AdapterRun, Any] = weakref.WeakKeyDictionary()


def install() -> None:
    """Watch out for wrappers; once per process however often it is called."""
    if not _handles:
        _handles.append(register_module_module_registration_hook(_on_registration))


def ranks_of(delta: SparseDelta) -> Ranks | None:
    """The ranks that take part in the step in progress of this delta; None if this process trains it alone."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    if delta.run in _CHOSEN:
        group = _CHOSEN[delta.run]
    else:
        group = sharding_group(delta)
        if group is None:
            group = next((wrapper.process_group for wrapper, state in _in_use(delta)), None)
    return Ranks(group) if group is not None and dist.get_world_size(group) > 1 else None


def averages_itself(delta: SparseDelta) -> bool:
    """Whether this package has to average the delta's gradients, as nobody else does."""
    return sharding_group(delta) is not None and not is_chosen(delta)


def is_chosen(delta: SparseDelta) -> bool:
    """Whether the user has said which ranks train the delta together."""
    return delta.run in _CHOSEN


def note_step(deltas: Iterable[SparseDelta]) -> None:
    """The forward passes so far belong to steps that are over."""
    for delta in deltas:
        for state in _WRAPPED.values():
            if delta in state.deltas:
                state.stepped[delta] = state.forwards


def set_data_parallel_group(model: nn.Module, group: Any | Literal["auto"]) -> None:
    """Say which ranks train the deltas of a model together. Needed only where neither DDP nor FSDP2 is at work.

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
        if group == "auto":
            _CHOSEN.pop(run, None)
        else:
            _CHOSEN[run] = group


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
