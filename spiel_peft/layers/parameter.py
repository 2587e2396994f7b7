"""Sparse deltas on bare parameters, such as the fused experts of a mixture: weights that only their module can use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._pytree import tree_map

from ..base_weight import BaseInfo, offload_hook
from ..delta import SparseDelta
from ..functional import folded_weight
from ..module_weight import aliased_weight, refolding, weight_in_place
from .base import SpIELLayer
from .unfolding import UnfoldingModule


class _BareWeight:
    """A parameter of a module, seen as the `weight` of a layer."""

    def __init__(self, host: SpIELParameters, name: str) -> None:
        self.host, self.name = host, name

    @property
    def weight(self) -> nn.Parameter:
        return self.host.base_layer._parameters[self.name]

    @weight.setter
    def weight(self, parameter: nn.Parameter) -> None:
        self.host.base_layer._parameters[self.name] = parameter

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        yield self.weight


class SpIELParameter(SpIELLayer):
    """The sparse deltas of one bare parameter. Its `SpIELParameters` runs the module that computes with it.

    Args:
        host: that this is to be a child of.
        name: of the parameter in the host's base layer.
        info: what `inspect_parameter` says of it.
        module_name: the parameter's full name in the model, part of every seed.
    """

    def __init__(self, host: SpIELParameters, name: str, info: BaseInfo, module_name: str) -> None:
        # Not a module, so no second copy of the base layer in state dicts.
        super().__init__(_BareWeight(host, name), info, module_name)  # type: ignore[arg-type]
        self.parameter_name = name

    def get_base_layer(self) -> Any:
        return self.base_layer

    @property
    def host(self) -> SpIELParameters:
        return self.base_layer.host

    @property
    def bias(self) -> None:
        return None

    def _delta_shape(self) -> tuple[int, ...]:
        # A matrix, its rows being those of all experts: momentum growth keeps a number per row and one per column.
        *rows, columns = self.info.weight_shape
        return (torch.Size(rows).numel(), columns)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{self.module_name} is a parameter, which cannot be called; call the module it belongs to")

    def deltas_in_use(self) -> list[SparseDelta]:
        """The deltas that a forward pass is to add; unmerges what is disabled, as all layers do."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        deltas = [] if self.merged or self.disable_adapters else self._active_deltas()
        if not deltas:
            self.unfold()
        return deltas

    def extra_repr(self) -> str:
        return f"{self.parameter_name!r}, {self.info.weight_shape}"


class SpIELParameters(UnfoldingModule, nn.Module, BaseTunerLayer):
    """A module some of whose own parameters carry sparse deltas, each in a child of the parameter's name.

    While a gradient is recorded, autograd forms the dense gradient of every adapted parameter; the deltas take theirs
    from it and it is freed. Between the optimizer steps of a run deltas live in the parameters themselves; before its
    first step, and where they cannot (evaluation mode with gradients, frozen adapters), a pass holds a copy of each
    adapted parameter until its backward pass. Without gradients, nothing is copied.

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
        used = [(part, deltas) for part in self.parts() if (deltas := part.deltas_in_use())]
        if not used:
            return self.base_layer(*args, **kwargs)
        if offload_hook(self.base_layer) is not None:
            raise RuntimeError(
                f"{used[0][0].module_name}: a bare parameter cannot be adapted while device_map offloads it; keep its "
                "module on a device"
            )
        if torch.is_grad_enabled():
            return self._recorded_forward(used, args, kwargs)
        with ExitStack() as stack:
            weights = {
                part.parameter_name: stack.enter_context(weight_in_place(part.weight_source(), deltas))
                for part, deltas in used
            }
            return torch.func.functional_call(self.base_layer, weights, args, kwargs)

    def _recorded_forward(
        self, used: Sequence[tuple[SpIELParameter, list[SparseDelta]]], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        weights, folds = {}, []
        for part, deltas in used:
            source = part.weight_source()
            if source.stays:
                weights[part.parameter_name] = aliased_weight(source, deltas)
                folds.append((source, deltas))
            else:
                weights[part.parameter_name] = folded_weight(source, deltas)
        out = torch.func.functional_call(self.base_layer, weights, args, kwargs)
        for source, deltas in folds:
            out = tree_map(lambda leaf, s=source, d=deltas: refolding(leaf, s, d), out)
        return out

    # What PEFT asks of every layer with adapters: the parts are such layers themselves.

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
        """Nothing: PEFT merges the parts, which it finds by themselves."""

    def unmerge(self) -> None:
        """Nothing, see `merge`."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with the adapters merged into its parameters if asked."""
        for part in self.parts():
            if merge:
                part.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            elif part.merged:
                part.unmerge()
        self.unfold()
        return self.base_layer

    # The base layer's parameters are read, moved and copied before the parts learn of it.

    def unfold(self) -> None:
        for part in self.parts():
            part.unfold()

    def __repr__(self) -> str:
        return "spiel." + super().__repr__()
