"""Adapted weights for modules that compute with them in their own way: autograd forms their dense gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from spiel_kernels import apply_deltas, deltas_between

from ..delta import SparseDelta
from ..weights.folding import Pairs, WeightSource
from .functions import folded_weight, pairs_of, tensors_of


class ModuleWeight(NamedTuple):
    """A parameter of a module, and the deltas that a pass adds to it.

    Attributes:
        name: of the parameter in its module.
        source: how it is read.
        deltas: in use.
    """

    name: str
    source: WeightSource
    deltas: list[SparseDelta]

    def pairs(self) -> Pairs:
        return pairs_of([tensor.detach() for tensor in tensors_of(self.deltas)])


def call_without_recording(weights: Sequence[ModuleWeight], call: Callable[[dict[str, Tensor]], Any]) -> Any:
    """Run a module's forward pass that records no gradient, with all its adapted weights made as for an operation.

    Args:
        weights: to adapt.
        call: runs the pass with the adapted weights, which it gets by name.
    """

    def run(remaining: Sequence[ModuleWeight], adapted: dict[str, Tensor]) -> Any:
        if not remaining:
            return call(adapted)
        first, rest = remaining[0], remaining[1:]

        def operation(weight: Tensor) -> Any:
            return _without_views(run(rest, {**adapted, first.name: weight}), weight)

        return first.source.use(first.pairs(), first.source.dtype, operation)

    # By name, so that threads with models on the same storages take their locks in one order.
    return run(sorted(weights, key=lambda weight: weight.name), {})


def _without_views(out: Any, weight: Tensor) -> Any:
    """`out` with a copy in place of every tensor that shares memory with the weight, which is another one soon."""
    address = weight.untyped_storage().data_ptr()

    def copied(leaf: Any) -> Any:
        shares = isinstance(leaf, Tensor) and _address(leaf) == address
        return leaf.clone() if shares else leaf

    return tree_map(copied, out)


def call_recording(weights: Sequence[ModuleWeight], call: Callable[[dict[str, Tensor]], Any]) -> Any:
    """Run a module's forward pass that records gradients, with copies of its adapted weights that do not outlive it.

    Where autograd keeps a weight for the backward pass, it keeps how to make it again instead of the copy.

    Args:
        weights, call: as in `call_without_recording`.
    """
    adapted = {weight.name: folded_weight(weight.source, weight.deltas) for weight in weights}
    if _hooks_on_saved_tensors():
        # Activation checkpointing keeps no copy either, and offloading decides itself where copies go.
        return call(adapted)
    with _saved_as_recipes([(adapted[weight.name], weight) for weight in weights]):
        return call(adapted)


def _hooks_on_saved_tensors() -> bool:
    """Whether hooks on saved tensors are at work already: only the innermost ones are called."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


class _Recipe(NamedTuple):
    """A view of an adapted weight, to be made again when the backward pass needs it."""

    source: WeightSource
    pairs: Pairs
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def make(self) -> Tensor:
        base = self.source.unchanged().detach()
        if not base.is_contiguous():
            return apply_deltas(base, self.pairs).as_strided(self.size, self.stride, self.offset)
        # The part of the weight in which the view lies: one expert of many, for example.
        reach = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True)) + 1
        end = self.offset + (reach if self.size.numel() else 0)
        part = apply_deltas(base.view(-1)[self.offset : end], deltas_between(self.pairs, self.offset, end))
        return part.as_strided(self.size, self.stride, 0)


@contextmanager
def _saved_as_recipes(copies: Sequence[tuple[Tensor, ModuleWeight]]) -> Iterator[None]:
    known = {_address(copy): (copy._version, weight.source, weight.pairs()) for copy, weight in copies}

    def pack(tensor: Tensor) -> Tensor | _Recipe:
        found = known.get(_address(tensor))
        if found is None or tensor._version != found[0] or tensor.dtype != found[1].dtype:
            return tensor
        return _Recipe(*found[1:], tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(packed: Tensor | _Recipe) -> Tensor:
        return packed.make() if isinstance(packed, _Recipe) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _address(tensor: Tensor) -> int | None:
    """Where the memory of a tensor begins; None for kinds of tensors that have none."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return tensor.untyped_storage().data_ptr() if plain else None
