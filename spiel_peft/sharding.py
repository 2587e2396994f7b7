"""Deltas under FSDP2 (`fully_shard`), which spreads the weights of the base model over ranks.

FSDP2 shards the base weights as in any model. Layers read a base weight between the hooks that gather it and free it,
while it is whole. Deltas stay whole on every rank, as under `DistributedDataParallel`: pruning and regrowing need all
deltas of a matrix, and 8-bit optimizers do not support sharded tensors. FSDP2 does not shard modules that are declared
as replicated. It does not average their gradients either; `spiel_peft.cycle.parallel` does.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .delta import SparseDelta

# FSDP2 sets this attribute on the modules that it manages.
MANAGED = "_is_fsdp_managed_module"
_REPLICATED = "replicate"

# The process group over which FSDP2 spreads the base weight of each delta.
_GROUPS: weakref.WeakKeyDictionary[SparseDelta, Any] = weakref.WeakKeyDictionary()


def declare_replicated(module_class: type[nn.Module]) -> None:
    """Keep FSDP2 from sharding the parameters and buffers of all modules of a class."""
    try:
        from torch.distributed._composable.contract import REGISTRY_KEY, RegistryItem
    except ImportError:  # in this version of PyTorch, sharded deltas raise an error in the first backward pass
        return
    # The mark is set on the class, so that no instance has to be marked, copied or pickled with it.
    setattr(module_class, REGISTRY_KEY, {_REPLICATED: RegistryItem()})


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP2 manages a module."""
    return bool(getattr(module, MANAGED, False))


def note_sharded(delta: SparseDelta, layer: nn.Module) -> None:
    """Record that FSDP2 manages the layer that a delta adapts, and move the delta to the device of the mesh.

    Args:
        delta: the delta.
        layer: the adapted layer.

    Raises:
        ValueError: tensor parallelism has split the base weight too, the mesh has several dimensions and not all
            processes, or `fully_shard` was called on the delta itself.
    """
    _refuse_own_unit(delta)
    mesh = _mesh_of(layer)
    _GROUPS[delta] = _group_of(mesh, delta.module_name)
    device_type = mesh.device_type if mesh is not None else None
    if device_type not in (None, "cpu", delta.values.device.type) and not delta.values.is_meta:
        delta.to(torch.device(device_type, torch.get_device_module(device_type).current_device()))


def _refuse_own_unit(delta: SparseDelta) -> None:
    """Raise a ValueError if `fully_shard` was called on the delta itself."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(delta, FSDPModule):
        raise ValueError(
            f"{delta.module_name}: fully_shard was called on the module of its deltas, which are not to be sharded; "
            "name the model's blocks instead of a size (auto_wrap_policy='TRANSFORMER_BASED_WRAP'), or set "
            f"min_num_params above {delta.k}"
        )


def is_sharded(delta: SparseDelta) -> bool:
    """Whether FSDP2 spreads the base weight of a delta over ranks."""
    return delta in _GROUPS


def sharding_group(delta: SparseDelta) -> Any | None:
    """The process group over which FSDP2 spreads the base weight of a delta; None if it does not."""
    return _GROUPS.get(delta)


def _mesh_of(layer: nn.Module) -> Any | None:
    """The device mesh over which the layer's parameters are spread; None if they are whole."""
    parameters = [parameter for parameter in layer.parameters() if hasattr(parameter, "device_mesh")]
    for parameter in parameters:
        if sum(not placement.is_replicate() for placement in parameter.placements) > 1:
            raise ValueError(
                "SpIEL cannot adapt weights that tensor parallelism has split: its positions are those of whole "
                "matrices; use FSDP2 (fully_shard) alone"
            )
    return parameters[0].device_mesh if parameters else None


def _group_of(mesh: Any | None, module_name: str) -> Any:
    """The process group of a device mesh: all processes without a mesh."""
    if mesh is None or mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    if mesh.ndim == 1:
        return mesh.get_group()
    raise ValueError(
        f"{module_name}: its weight is spread over {mesh.size()} of {dist.get_world_size()} processes in "
        f"{mesh.ndim} dimensions ({mesh.mesh_dim_names}); SpIEL needs a mesh of one dimension, or one of all processes"
    )


def refuse_fsdp1(wrapper: nn.Module, wrapped: nn.Module) -> None:
    """Raise a ValueError if FSDP1 is about to spread a model with deltas over several processes.

    Args:
        wrapper: the module that is being created around another one, perhaps by FSDP1.
        wrapped: the module inside.
    """
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if module is None or not isinstance(wrapper, module.FullyShardedDataParallel) or dist.get_world_size() == 1:
        return  # one process keeps whole weights: loading and saving works, and PEFT's own tests need it
    if any(isinstance(child, SparseDelta) for child in wrapped.modules()):
        raise ValueError(
            "SpIEL does not work under FullyShardedDataParallel (FSDP1), which flattens all parameters of a block into "
            "one of a single dtype; use FSDP2: fsdp_version=2 in Accelerate's FullyShardedDataParallelPlugin, "
            '`fsdp_version: 2` in its config file, `"fsdp_version": 2` in fsdp_config of TrainingArguments, or '
            "torch.distributed.fsdp.fully_shard"
        )


class ManagedFlag:
    """The attribute `_is_fsdp_managed_module` of adapted layers. When FSDP2 sets it, `note_sharded` is called."""

    def __get__(self, layer: Any, owner: type | None = None) -> bool:
        return layer is not None and bool(layer.__dict__.get(MANAGED, False))

    def __set__(self, layer: Any, value: bool) -> None:
        layer.__dict__[MANAGED] = value
        if value:
            for delta in layer.spiel_delta.values():
                note_sharded(delta, layer)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is whole on this process."""
    return not hasattr(tensor, "device_mesh")


def gathered(weight: Tensor, module_name: str) -> Tensor:
    """Return a base weight that is whole; raise a RuntimeError if it is sharded."""
    if not is_plain(weight):
        raise RuntimeError(
            f"{module_name}: its base weight is sharded. Call the module that was given to fully_shard, whose hooks "
            "gather the weights; for other methods than forward: torch.distributed.fsdp.register_fsdp_forward_method("
            "model, 'generate'). Weights that tensor parallelism has split cannot be adapted"
        )
    return weight


def refuse_merge(weight: Tensor | None, module_name: str) -> None:
    """Raise a ValueError if the base weight to merge into is sharded."""
    if weight is not None and not is_plain(weight):
        raise ValueError(
            f"{module_name}: cannot merge into a sharded base weight, nothing was changed; save the adapter and merge "
            "it in one process into a model that is not sharded"
        )


declare_replicated(SparseDelta)
