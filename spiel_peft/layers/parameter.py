"""Sparse deltas on bare parameters, such as the fused experts of a mixture, which only their own module computes with.

Autograd forms the dense gradient of such a parameter, and the deltas take their entries from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from spiel_kernels import apply_deltas, deltas_between

from ..autograd.functions import folded_weight, pairs_of, tensors_of
from ..delta import SparseDelta
from ..weights.base_weight import BaseInfo, offload_hook
from ..weights.folding import Pairs, WeightSource, WeightState, WholeWeights, call_with
from .base import SpIELLayer


class _BareWeight:
    """A parameter of a module, seen as the `weight` of a layer."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    @property
    def weight(self) -> nn.Parameter:
        return self.module._parameters[self.name]

    @weight.setter
    def weight(self, parameter: nn.Parameter) -> None:
        self.module._parameters[self.name] = parameter

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        yield self.weight


class SpIELParameter(SpIELLayer):
    """The sparse deltas of one bare parameter. Its `SpIELParameters` runs the module that computes with it.

    Args:
        host: the `SpIELParameters` that is to hold this as a child.
        name: of the parameter in the host's base layer.
        info: its description, from `inspect_parameter`.
        module_name: the parameter's full name in the model, part of every seed.
    """

    def __init__(self, host: SpIELParameters, name: str, info: BaseInfo, module_name: str) -> None:
        # `_BareWeight` is no module, so that state dicts do not hold the base layer twice.
        super().__init__(_BareWeight(host.base_layer, name), info, module_name)  # type: ignore[arg-type]
        self.parameter_name = self.weight_name = name

    def get_base_layer(self) -> Any:
        return self.base_layer

    def computing_module(self) -> nn.Module:
        return self.base_layer.module

    @property
    def bias(self) -> None:
        return None

    def _delta_shape(self) -> tuple[int, ...]:
        # A matrix with the rows of all experts: momentum growth keeps one number per row and one per column.
        *rows, columns = self.info.weight_shape
        return (torch.Size(rows).numel(), columns)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{self.module_name} is a parameter, which cannot be called; call the module it belongs to")

    def extra_repr(self) -> str:
        return f"{self.parameter_name!r}, {self.info.weight_shape}"


class SpIELParameters(WholeWeights, nn.Module, BaseTunerLayer):
    """A module with sparse deltas on some of its own parameters, each in a child of the parameter's name.

    When gradients are recorded, the module computes with a copy of each adapted parameter, which is freed when the
    forward pass ends. The backward pass makes the parts of the copies that it needs again. Autograd forms the dense
    gradient of every adapted parameter; the deltas take their entries from it, and it is freed. Without gradients
    nothing is copied on a CPU: the deltas are in the parameters themselves for the length of the forward pass.

    Args:
        base_layer: the module that holds the parameters and computes with them in `forward`.
    """

    adapter_layer_names = ()
    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.train(base_layer.training)

    def parts(self) -> list[SpIELParameter]:
        """The adapted parameters, in the order in which they were added."""
        return [child for child in self.children() if isinstance(child, SpIELParameter)]

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "_is_replica" in self.__dict__:
            raise RuntimeError(
                "SpIEL does not work under nn.DataParallel; use DistributedDataParallel (torchrun, accelerate launch)"
            )
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names (mixed batches) is not supported by SpIEL; use set_adapter")
        used = {part: deltas for part in self.parts() if (deltas := part.deltas_in_use())}
        if not used:
            return self.base_layer(*args, **kwargs)
        if offload_hook(self.base_layer) is not None:
            raise RuntimeError(
                f"{next(iter(used)).module_name}: a bare parameter cannot be adapted while device_map offloads "
                "it; keep its module on a device"
            )
        weights = [
            _AdaptedParameter(part.parameter_name, part.weight_source, part.weight_source.state(), deltas)
            for part, deltas in used.items()
        ]
        call = _call_recording if torch.is_grad_enabled() else _call_without_recording
        return call(weights, lambda adapted: call_with(self.base_layer, adapted, args, kwargs))

    # PEFT's and diffusers' interface of a layer with adapters. The parts are such layers too, and do the work.

    def set_scale(self, adapter: str, scale: float) -> None:
        pass

    def scale_layer(self, scale: float) -> None:
        pass

    def unscale_layer(self, scale: float | None = None) -> None:
        pass

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    @property
    def weight(self) -> Any:
        return self._modules.get("weight") or self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self._modules.get("bias") or self.base_layer.bias

    @property
    def active_adapter(self) -> str | list[str]:
        return next((part.active_adapter for part in self.parts()), [])

    @property
    def disable_adapters(self) -> bool:
        return any(part.disable_adapters for part in self.parts())

    @property
    def merged_adapters(self) -> list[str]:
        return next((list(part.merged_adapters) for part in self.parts()), [])

    def enable_adapters(self, enabled: bool) -> None:
        pass

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        pass

    def delete_adapter(self, adapter_name: str) -> None:
        pass

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Does nothing: PEFT finds the parts as layers of their own and merges them."""

    def unmerge(self) -> None:
        """Does nothing, see `merge`."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with the adapters merged into its parameters if asked."""
        for part in self.parts():
            if merge:
                part.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            elif part.merged:
                part.unmerge()
        self.undo_interrupted()
        return self.base_layer

    def undo_interrupted(self) -> None:
        """Restore the base layer's parameters, which are read, moved and copied before those of the parts."""
        for part in self.parts():
            part.undo_interrupted()

    def __repr__(self) -> str:
        return "spiel." + super().__repr__()


class _AdaptedParameter(NamedTuple):
    """A parameter of a module, and the deltas that a pass adds to it.

    Attributes:
        name: of the parameter in its module.
        source, state: how it is read, and its state when the pass began.
        deltas: to add.
    """

    name: str
    source: WeightSource
    state: WeightState
    deltas: list[SparseDelta]

    def pairs(self) -> Pairs:
        return pairs_of([tensor.detach() for tensor in tensors_of(self.deltas)])


def _call_without_recording(weights: Sequence[_AdaptedParameter], call: Callable[[dict[str, Tensor]], Any]) -> Any:
    """Run a module's forward pass without gradients, with deltas in its parameters for the length of the pass.

    Args:
        weights: the parameters to adapt.
        call: runs the pass with the adapted parameters, which it gets by name.
    """

    def run(remaining: Sequence[_AdaptedParameter], adapted: dict[str, Tensor]) -> Any:
        if not remaining:
            return call(adapted)
        first, rest = remaining[0], remaining[1:]

        def operation(weight: Tensor) -> Any:
            return _without_views(run(rest, {**adapted, first.name: weight}), weight)

        return first.source.use(first.state, first.pairs(), first.state.dtype, operation)

    # By name, so that threads with models on the same storages take their locks in one order.
    return run(sorted(weights, key=lambda weight: weight.name), {})


def _without_views(out: Any, weight: Tensor) -> Any:
    """The output with its own copy of every tensor that shares memory with the weight, which is about to change."""
    address = weight.untyped_storage().data_ptr()

    def copied(leaf: Any) -> Any:
        shares = isinstance(leaf, Tensor) and _address(leaf) == address
        return leaf.clone() if shares else leaf

    return tree_map(copied, out)


def _call_recording(weights: Sequence[_AdaptedParameter], call: Callable[[dict[str, Tensor]], Any]) -> Any:
    """Run a module's forward pass that records gradients, with copies of its parameters that the pass frees.

    Where autograd would keep a copy for the backward pass, it keeps a recipe to make the copy again.

    Args:
        weights, call: as in `_call_without_recording`.
    """
    adapted = {weight.name: folded_weight(weight.source, weight.deltas, weight.state) for weight in weights}
    if _hooks_on_saved_tensors():
        # Activation checkpointing keeps no copy either, and offloading decides itself where copies go.
        return call(adapted)
    with _saved_as_recipes([(adapted[weight.name], weight) for weight in weights]):
        return call(adapted)


def _hooks_on_saved_tensors() -> bool:
    """Whether hooks on saved tensors are set already: PyTorch calls only the innermost ones."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


class _Recipe(NamedTuple):
    """How to make a view of an adapted weight again when the backward pass needs it."""

    source: WeightSource
    state: WeightState
    pairs: Pairs
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def make(self) -> Tensor:
        base = self.source.unchanged(self.state).detach()
        if not base.is_contiguous():
            return apply_deltas(base, self.pairs).as_strided(self.size, self.stride, self.offset)
        # The part of the weight in which the view lies: one expert of many, for example.
        reach = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True)) + 1
        end = self.offset + (reach if self.size.numel() else 0)
        part = apply_deltas(base.view(-1)[self.offset : end], deltas_between(self.pairs, self.offset, end))
        return part.as_strided(self.size, self.stride, 0)


@contextmanager
def _saved_as_recipes(copies: Sequence[tuple[Tensor, _AdaptedParameter]]) -> Iterator[None]:
    known = {_address(copy): (copy._version, weight.source, weight.state, weight.pairs()) for copy, weight in copies}

    def pack(tensor: Tensor) -> Tensor | _Recipe:
        found = known.get(_address(tensor))
        if found is None or tensor._version != found[0] or tensor.dtype != found[2].dtype:
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
