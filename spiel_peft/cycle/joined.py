"""Ranks that run out of data early, inside `torch.distributed.algorithms.Join` (uneven numbers of batches).

Such a rank shadows the wrapper's collectives, but takes no steps and so cannot take part in a cycle. While one has
left, the others step on and their cycle pauses: windows are dropped, closes skipped. When all have left, PyTorch gives
every rank the parameters and buffers of the last one; here the training state and the optimizer state of the deltas
follow, so that the next step finds all ranks equal.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import JoinHook

from ..delta import SparseDelta
from ..training_state import StepGradient, TrainingState
from .ranks import Ranks

Steppers = weakref.WeakKeyDictionary[SparseDelta, list[weakref.ref[torch.optim.Optimizer]]]

# Contexts so far, by what must be the same on all ranks.
_CONTEXTS: Counter[tuple[Any, str]] = Counter()


class JoinHooks:
    """Stands in for the `join_hook` of one `DistributedDataParallel` wrapper, and adds what the deltas need.

    Args:
        wrapper: the wrapper.
        deltas: those whose gradients it averages.
    """

    def __init__(self, wrapper: Any = None, deltas: Iterable[SparseDelta] = ()) -> None:
        self._wrapper = weakref.ref(wrapper) if wrapper is not None else None
        self._deltas = weakref.WeakSet(deltas)
        # Those that stepped a delta last.
        self.optimizers: Steppers = weakref.WeakKeyDictionary()
        self._key: str | None = None
        self._left = False

    def __reduce__(self) -> tuple[type[JoinHooks], tuple[()]]:
        # Copies and pickles of a wrapper get hooks of their own at their first forward pass.
        return JoinHooks, ()

    def __call__(self, **kwargs: Any) -> JoinHook:
        wrapper = self._wrapper() if self._wrapper is not None else None
        if wrapper is None:
            raise RuntimeError("a copied DistributedDataParallel wrapper must run a forward pass before it can join")
        names = "\n".join(f"{delta.run.adapter_name} {delta.module_name}" for delta in self.deltas())
        digest = hashlib.blake2b(names.encode(), digest_size=8).hexdigest()
        _CONTEXTS[wrapper.process_group, digest] += 1
        self._key = f"spiel_peft/left/{digest}/{_CONTEXTS[wrapper.process_group, digest]}"
        self._left = False
        return _Shadow(self, wrapper.process_group, type(wrapper).join_hook(wrapper, **kwargs))

    def deltas(self) -> list[SparseDelta]:
        return sorted(self._deltas, key=lambda delta: (delta.run.adapter_name, delta.module_name))

    def someone_has_left(self) -> bool:
        """Whether a rank runs out of data in the context that is open; all others get the same answer at one step.

        Not by a collective, which the rank that has left would have to expect. It leaves a note before it takes part
        in the shadowed collectives of the forward pass that it misses, and without it they are not over.
        """
        if self._key is not None and not self._left:
            wrapper = self._wrapper() if self._wrapper is not None else None
            self._left = wrapper is not None and _store(wrapper.process_group).check([self._key])
        return self._left

    def leave(self, group: Any) -> None:
        """Tell the others that this rank has run out of data."""
        if self._key is not None and not self._left:
            _store(group).set(self._key, "1")
            self._left = True

    def end(self, group: Any, is_last: bool) -> None:
        """All ranks have left: give all of them the state of a last one, unless all have left together."""
        uneven = self.someone_has_left()
        self._key, self._left = None, False
        deltas = self.deltas()
        if uneven and deltas:
            _spread_state(Ranks(group), deltas, self.optimizers, is_last)


class _Shadow(JoinHook):
    """What a rank that has left does while others go on, and what all do in the end."""

    def __init__(self, hooks: JoinHooks, group: Any, inner: JoinHook) -> None:
        self.hooks, self.group, self.inner = hooks, group, inner

    def main_hook(self) -> None:
        self.hooks.leave(self.group)
        self.inner.main_hook()

    def post_hook(self, is_last_joiner: bool) -> None:
        self.inner.post_hook(is_last_joiner)
        self.hooks.end(self.group, is_last_joiner)


def _store(group: Any) -> Any:
    # The store through which the members of a group found each other; torch has no public way to it.
    return dist.distributed_c10d._get_process_group_store(group)


@dataclass(frozen=True)
class _Outline:
    """What a tensor looks like, for those who are to receive it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_cpu: bool


def _spread_state(ranks: Ranks, deltas: list[SparseDelta], optimizers: Steppers, is_last: bool) -> None:
    device = deltas[0].values.device
    # The same choice as PyTorch's own for parameters and buffers.
    source = int(ranks.gather(torch.tensor(ranks.index if is_last else -1, device=device)).max())
    own = [_entries(delta, optimizers) for delta in deltas]
    outlines = [[{key: _outline(value) for key, value in entries.items()} for entries in own]]
    dist.broadcast_object_list(outlines, ranks.name(source), group=ranks.group, device=device)
    for delta, entries, outline in zip(deltas, own, outlines[0], strict=True):
        received = {key: _receive(ranks, source, entries.get(key), what, device) for key, what in outline.items()}
        if ranks.index != source:
            _take(delta, _states(delta, optimizers), received)


def _entries(delta: SparseDelta, optimizers: Steppers) -> dict[tuple[int, str], Any]:
    """What is to be the same on all ranks: training state under -1, states of optimizers under their places."""
    entries: dict[tuple[int, str], Any] = {(-1, name): tensor for name, tensor in delta.state.tensors().items()}
    for place, state in enumerate(_states(delta, optimizers)):
        entries.update({(place, name): value for name, value in state.items()})
    return entries


def _states(delta: SparseDelta, optimizers: Steppers) -> list[dict[str, Any]]:
    alive = [optimizer() for optimizer in optimizers.get(delta, ())]
    return [optimizer.state[delta.values] for optimizer in alive if optimizer is not None]


def _outline(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return _Outline(tuple(value.shape), value.dtype, value.device.type == "cpu")


def _receive(ranks: Ranks, source: int, own: Any, outline: Any, device: torch.device) -> Any:
    if not isinstance(outline, _Outline):
        return outline
    if ranks.index == source:
        tensor = own.detach().to(device).contiguous()
    else:
        tensor = torch.empty(outline.shape, dtype=outline.dtype, device=device)
    ranks.broadcast(tensor, source)
    return tensor.cpu() if outline.on_cpu else tensor


def _take(delta: SparseDelta, states: list[dict[str, Any]], received: dict[tuple[int, str], Any]) -> None:
    """Make what was received this delta's own: objects that others hold on to are changed in place."""
    training = {name: value for (place, name), value in received.items() if place == -1}
    new = TrainingState.from_tensors(training, delta.values.device)
    for name in ("step", "closes", "fresh", "total_steps", "max_lr", "window", "row", "col"):
        setattr(delta.state, name, getattr(new, name))
    delta.state.current = StepGradient()
    delta.untouched = False
    for (place, name), value in received.items():
        if not 0 <= place < len(states):
            continue
        own = states[place].get(name)
        if isinstance(own, Tensor) and isinstance(value, Tensor) and own.shape == value.shape:
            own.copy_(value)
        else:
            states[place][name] = value
