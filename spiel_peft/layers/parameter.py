"""Sparse deltas on bare parameters, such as the fused experts of a mixture: weights that only their module can use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..autograd.module_weight import ModuleWeight, call_recording, call_without_recording
from ..weights.base_weight import BaseInfo, offload_hook
from ..weights.folding import WholeWeights, call_with
from .base import SpIELLayer


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

    def computing_module(self) -> nn.Module:
        return self.host.base_layer

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

    def extra_repr(self) -> str:
        return f"{self.parameter_name!r}, {self.info.weight_shape}"


class SpIELParameters(WholeWeights, nn.Module, BaseTunerLayer):
    """A module some of whose own parameters carry sparse deltas, each in a child of the parameter's name.

    While a gradient is recorded, autograd forms the dense gradient of every adapted parameter; the deltas take theirs
    from it and it is freed. The module computes with a copy of each adapted parameter, which is freed when its forward
    pass ends; the backward pass makes what it needs of them again. Without gradients nothing is copied on a CPU: the
    deltas are in the parameters themselves for the length of the module's forward pass.

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
        weights = [ModuleWeight(part.parameter_name, part.weight_source(), deltas) for part, deltas in used.items()]
        call = call_recording if torch.is_grad_enabled() else call_without_recording
        return call(weights, lambda adapted: call_with(self.base_layer, adapted, args, kwargs))

    # PEFT and diffusers ask this of every layer with adapters. The parts are such layers themselves and do it.

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
        self.undo_interrupted()
        return self.base_layer

    # The base layer's parameters are read, moved and copied before the parts learn of it.

    def undo_interrupted(self) -> None:
        for part in self.parts():
            part.undo_interrupted()

    def __repr__(self) -> str:
        return "spiel." + super().__repr__()
