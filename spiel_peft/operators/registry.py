"""Which layer an operator is about, and how operators are registered."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from spiel_kernels.dispatch import new_library

from ..delta import SparseDelta
from ..folding import Pairs
from ..weight_source import WeightSource

NAMESPACE = "spiel_peft"


class AdaptedLayer(Protocol):
    """What an operator needs to know of a layer when it runs."""

    spiel_delta: Any

    def weight_source(self, compute_dtype: torch.dtype) -> WeightSource:
        """How the weight is read."""


_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()
library = new_library(NAMESPACE)


def number_of(layer: AdaptedLayer) -> Tensor:
    """A number, in a tensor, under which operators find the layer as long as it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number)


def find_layer(number: Tensor) -> Any:
    """The layer of a number."""
    layer = _layers.get(int(number))
    if layer is None:
        raise RuntimeError("a compiled model refers to a SpIEL layer that is gone; compile the model again")
    return layer


def owners_of(layer: Any, values: Sequence[Tensor]) -> list[SparseDelta]:
    """The deltas that these values belong to: a graph may run after another adapter has become the active one."""
    owners = {delta.values.data_ptr(): delta for delta in layer.spiel_delta.values()}
    if any(v.data_ptr() not in owners for v in values):
        raise RuntimeError(f"{layer.module_name}: an adapter was deleted between a forward pass and its backward pass")
    return [owners[v.data_ptr()] for v in values]


def detached_pairs(indices: Sequence[Tensor], values: Sequence[Tensor]) -> Pairs:
    """Indices with their values, which autograd is not to follow inside an operator."""
    return list(zip(indices, [v.detach() for v in values], strict=True))


def define(schema: str) -> None:
    """Declare an operator of the namespace."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def implement(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Say what a declared operator does, on all devices, and what shapes it returns."""
    library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
