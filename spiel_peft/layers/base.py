"""`SpIELLayer`: the deltas of a layer, its forward pass through the base layer, and how its weight is read."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import quantization_extra_repr
from torch import Tensor, nn

from spiel_kernels import write_entries

from ..autograd.compiled import adapted_operator, number_of
from ..autograd.functions import adapted_forward, folded_weight
from ..autograd.operations import WeightOp
from ..config import SpIELConfig
from ..delta import AdapterRun, SparseDelta, first_positions, first_values, new_indices
from ..sharding import ManagedFlag, gathered, is_managed, note_sharded
from ..weights.base_weight import (
    FLOAT_DTYPES,
    BaseInfo,
    keep_readable,
    offload_hook,
    onloaded,
    run_with_hooks,
)
from ..weights.folding import WEIGHT_CHANGED, WeightSource, WholeWeights, call_with, undo_swap
from ..weights.quantized import adapted_in_workspace
from .merging import Merging


class SpIELLayer(WholeWeights, nn.Module, BaseTunerLayer):
    """A frozen base layer and the sparse deltas of any number of adapters (SpIEL: Ansell et al., 2024, section 3).

    Args:
        base_layer: the layer to adapt.
        info: its description, from `inspect_base`.
        module_name: its full name in the model, part of every seed.
    """

    adapter_layer_names = ("spiel_delta",)
    other_param_names = ()
    weight_name = "weight"  # of the parameter in `computing_module()`
    _is_fsdp_managed_module = ManagedFlag()
    # Forward methods that this class reproduces. A base layer with another one runs it on the adapted weight.
    known_forwards: tuple[Any, ...] = ()

    def __init__(self, base_layer: nn.Module, info: BaseInfo, module_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        keep_readable(base_layer)
        self.info = info
        self.quantization_backend = info.backend
        self.module_name = module_name
        self.in_features, self.out_features = info.fan_in, info.fan_out
        self.spiel_delta = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        # Names of modules that share the base weight; merging must not change theirs.
        self.shared_with: tuple[str, ...] = ()
        # The layer whose delta this one shares (`ensure_weight_tying`); in a tuple, so that it is no child module.
        self.tied_to: tuple[SpIELLayer, ...] = ()
        self.merging = Merging()
        self.weight_source = WeightSource(self, quantized=info.backend is not None)
        self._number = number_of(self)

    # Adapters

    def update_layer(self, adapter_name: str, config: SpIELConfig, run: AdapterRun, num_deltas: int) -> None:
        """Add an adapter with `num_deltas` values.

        Positions are drawn from the config's seed, or copied from an adapter that was added with the very same
        config object (TRL's reference adapters rely on starting equal).
        """
        device, dtype = self._delta_device(), self._delta_dtype(config)
        twin = self._twin_of(config)
        if twin is not None and twin.k == num_deltas:
            indices = twin()[0].detach().clone()
        else:
            positions = first_positions(config, self.module_name, self.info.numel, num_deltas)
            indices = new_indices(positions, self.info.numel, device)
        values, shape = first_values(config, num_deltas), self._delta_shape()
        delta = SparseDelta(run, self.module_name, shape, indices, values.to(device=device, dtype=dtype))
        self._add_delta(adapter_name, delta, config)

    def share_delta(self, adapter_name: str, config: SpIELConfig, source: SpIELLayer) -> None:
        """Use the delta of another layer whose weight is tied to this one's."""
        self.tied_to = (source,)
        self._add_delta(adapter_name, source.spiel_delta[adapter_name], config)

    def _add_delta(self, adapter_name: str, delta: SparseDelta, config: SpIELConfig) -> None:
        delta.train(self.training)
        self.spiel_delta[adapter_name] = delta
        if is_managed(self) or is_managed(self.get_base_layer()):
            note_sharded(delta, self)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _twin_of(self, config: SpIELConfig) -> SparseDelta | None:
        return next((d for d in self.spiel_delta.values() if d.run.config is config), None)

    def _delta_shape(self) -> tuple[int, ...]:
        return self.info.weight_shape

    def _base_dtype(self) -> torch.dtype:
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return dtype if dtype in FLOAT_DTYPES else torch.float32

    def _delta_dtype(self, config: SpIELConfig) -> torch.dtype:
        return getattr(torch, config.delta_dtype) if config.delta_dtype else self._base_dtype()

    def _delta_device(self) -> torch.device:
        base = self.get_base_layer()
        device, _ = self._get_base_layer_device_and_dtype(base)
        hook = offload_hook(base)
        if hook is not None:
            return torch.device(hook.execution_device)
        return device if device is not None else torch.device("cpu")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own version would round values to the base's dtype, so that loading would lose precision.
        if adapter_name not in self.spiel_delta:
            return
        delta = self.spiel_delta[adapter_name]
        target = device if device is not None else self._delta_device()
        if delta.values.is_meta:
            return
        delta.to(target)

    def cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool) -> None:
        """Apply the dtype rule: the config's `delta_dtype`; else float32 for half-precision bases if asked."""
        if adapter_name not in self.spiel_delta:
            return
        delta = self.spiel_delta[adapter_name]
        dtype = self._delta_dtype(delta.run.config)
        if not delta.run.config.delta_dtype and autocast_adapter_dtype and dtype != torch.float64:
            dtype = torch.float32
        delta.keep_dtype = dtype
        delta.restore_dtype()

    # The scale of deltas, as diffusers sets it (`set_adapters` with weights, `fuse_lora`). Training works with any.

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the adapter's deltas by `scale` wherever they are used, from now on."""
        self._set_scales({adapter: scale})

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of every active adapter by `scale`."""
        self._set_scales({name: self.spiel_delta[name].scale * _finite_number(scale) for name in self._active_here()})

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of every active adapter by `scale`; None sets it to 1."""
        scales = {name: self.spiel_delta[name].scale for name in self._active_here()}
        self._set_scales({name: 1.0 if scale is None else old / _finite_number(scale) for name, old in scales.items()})

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.spiel_delta]

    def _set_scales(self, scales: dict[str, float]) -> None:
        scales = {name: _finite_number(scale) for name, scale in scales.items() if name in self.spiel_delta}
        changed = [name for name, scale in scales.items() if scale != self.spiel_delta[name].scale]
        merged = sorted(set(changed) & set(self.merged_adapters))
        if merged:
            raise ValueError(
                f"{self.module_name}: the scale of {merged} cannot change while they are merged into the base weight; "
                "call unmerge_adapter() first"
            )
        for name in changed:
            self.spiel_delta[name].scale = scales[name]

    def get_base_layer(self) -> nn.Module:
        # As PEFT's, but faster: it does not ask a module for attributes that are missing.
        base = self._modules["base_layer"]
        while "base_layer" in base._modules:
            base = base._modules["base_layer"]
        return base

    # Forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "_is_replica" in self.__dict__:
            raise RuntimeError(
                "SpIEL does not work under nn.DataParallel; use DistributedDataParallel (torchrun, accelerate launch)"
            )
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names (mixed batches) is not supported by SpIEL; use set_adapter")
        deltas = self.deltas_in_use()
        if not deltas:
            return self.base_layer(x, *args, **kwargs)
        base = self.get_base_layer()
        if not self._reproduces(base):
            return self._swapped_forward(base, deltas, x, *args, **kwargs)
        return run_with_hooks(base, partial(self._adapted_forward, deltas), x, *args, **kwargs)

    def deltas_in_use(self) -> list[SparseDelta]:
        """The deltas that a forward pass adds; unmerges the layer first if adapters are disabled."""
        self.undo_interrupted()
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged or self.disable_adapters:
            return []
        present = self._modules["spiel_delta"]._modules
        deltas = [present[name] for name in self.active_adapters if name in present]
        if self.training and torch.is_grad_enabled():
            for delta in deltas:
                delta.restore_dtype()
        return deltas

    def _fits_operator(self, base: nn.Module) -> bool:
        """Whether torch.compile is tracing and this layer can be an operator of its graph."""
        # A trained base weight needs its dense gradient, an offloaded one its hooks.
        return torch.compiler.is_compiling() and not base.weight.requires_grad and offload_hook(base) is None

    def _reproduces(self, base: nn.Module) -> bool:
        # accelerate keeps what it replaced as `_old_forward`.
        own = base.__dict__.get("_old_forward" if "_hf_hook" in base.__dict__ else "forward")
        patched = own is not None and getattr(own, "__func__", None) is not type(base).forward
        return self._knows_forward(base) and not patched

    def _knows_forward(self, base: nn.Module) -> bool:
        return type(base).forward in self.known_forwards

    def _adapted_forward(self, deltas: list[SparseDelta], x: Tensor) -> Tensor:
        raise NotImplementedError

    def _apply_adapted(self, op: WeightOp, deltas: list[SparseDelta], x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Run `op` with the adapted weight; x has the compute dtype, or is the ids of an embedding."""
        base = self.get_base_layer()
        if self._fits_operator(base):
            return adapted_operator(self._number, op, base.weight, self.info.weight_shape, deltas, x, bias)
        return adapted_forward(op, self.weight_source, deltas, x, bias)

    def _swapped_forward(
        self, base: nn.Module, deltas: list[SparseDelta], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if offload_hook(base) is not None:
            raise RuntimeError(
                f"{self.module_name}: a {type(base).__name__} with a forward pass of its own cannot be adapted while "
                "device_map offloads it; keep this layer on a device"
            )
        weight = folded_weight(self.weight_source, deltas)
        return call_with(base, {"weight": weight}, (x, *args), kwargs)

    # What `weight_source` asks of its layer (`spiel_peft.weights.folding.SourceOwner`)

    def plain_parameter(self) -> Tensor | None:
        """The parameter that holds the weight; None for a weight that is quantized or offloaded."""
        base = self.get_base_layer()
        # Holding on to an offloaded weight would keep it on the device until the backward pass.
        return None if self.quantization_backend is not None or offload_hook(base) is not None else base.weight

    def rounding_dtype(self, compute_dtype: torch.dtype | None) -> torch.dtype:
        """The dtype to which the adapted weight is rounded: a plain weight's own, the compute dtype if quantized."""
        if self.quantization_backend is None:
            return self.get_base_layer().weight.dtype
        return compute_dtype or self._base_dtype()

    def keeps_parameter(self) -> bool:
        """Whether the base parameter stays in memory after an operation; FSDP2 frees a gathered one."""
        return not (is_managed(self) or is_managed(self.get_base_layer()))

    def read_weight(self) -> Tensor:
        """The weight, dequantized if need be; raises a RuntimeError if deltas are merged into it, or it is sharded."""
        self._check_unmerged()
        base = self.get_base_layer()
        if self.quantization_backend is None and offload_hook(base) is None:
            return gathered(base.weight, self.module_name)
        with onloaded(base):
            return gathered(BaseTunerLayer.get_base_weight(self), self.module_name)

    @contextmanager
    def adapted_in_workspace(
        self, pairs: Sequence[tuple[Tensor, Tensor]], compute_dtype: torch.dtype
    ) -> Iterator[Tensor | None]:
        """`spiel_peft.weights.quantized.adapted_in_workspace` for this layer."""
        self._check_unmerged()
        base = self.get_base_layer()
        with onloaded(base), adapted_in_workspace(base, pairs, compute_dtype) as weight:
            yield weight

    def _check_unmerged(self) -> None:
        if self.merged_adapters:
            raise RuntimeError(WEIGHT_CHANGED)

    # Merging

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into the base weight."""
        return self.merging.adapters

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's delta as a dense tensor: the shape of the stored weight, the dtype of the values."""
        delta = self.spiel_delta[adapter]
        dense = torch.zeros(self.info.weight_shape, dtype=delta.values.dtype, device=delta.values.device)
        indices, values = delta()
        return write_entries(dense, indices.to(torch.int64), values.detach())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapted weight into the base layer; `unmerge` restores the originals bit for bit.

        Args:
            safe_merge: raise an error, and leave the base as it is, if the result is not finite.
            adapter_names: adapters to merge on top of those merged already; the active ones by default.

        Raises:
            ValueError: a result is not finite (only with `safe_merge`).
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.spiel_delta]
        if names:
            self.merging.add(self, names, safe_merge)

    def unmerge(self) -> None:
        """Undo `merge`: every overwritten weight gets its original bits back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merging.reset(self, [])

    # Every use of the weight first takes out deltas that an interrupted operation has left in it.

    def computing_module(self) -> nn.Module:
        """The module whose forward pass computes with the weight."""
        return self.get_base_layer()

    def undo_interrupted(self) -> None:
        """Take out deltas, and put back parameters, that an interrupted operation has left; usually there are none."""
        self.weight_source.undo_interrupted()
        undo_swap(self.computing_module)

    def get_base_weight(self) -> Tensor:
        """The base weight without deltas, dequantized if need be."""
        self.undo_interrupted()
        return super().get_base_weight()

    @property
    def weight(self) -> Tensor:
        """The base layer's weight as it is stored, without deltas."""
        self.undo_interrupted()
        return super().weight

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        self.undo_interrupted()
        super().set_adapter(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        self.undo_interrupted()
        super().delete_adapter(adapter_name)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["weight_source"]  # a copy has one of its own
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.weight_source = WeightSource(self, quantized=self.quantization_backend is not None)
        self._number = number_of(self)

    def __repr__(self) -> str:
        return "spiel." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def _finite_number(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"the scale of an adapter must be a finite number, got {scale!r}")
    return float(scale)
