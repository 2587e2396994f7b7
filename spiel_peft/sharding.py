"""What the deltas need to know of a base model whose weights FSDP2 (`fully_shard`) spreads over ranks.

Base weights are sharded as in any model: they are whole between the hooks that gather and free them, which is where the
layers read them. Deltas stay whole on every rank, as they do under `DistributedDataParallel`: pruning and regrowth look
at all entries of a matrix, and 8-bit optimizers know no sharded tensors. FSDP2 leaves modules alone that declare to be
replicated already; their gradients then have to be averaged, which `spiel_peft.cycle.parallel` does.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .delta import SparseDelta

# How FSDP2 calls the modules it is in charge of.
MANAGED = "_is_fsdp_managed_module"
_REPLICATED = "replicate"

# The processes over which the base weight of a delta is spread.
_GROUPS: weakref.WeakKeyDictionary[SparseDelta, Any] = weakref.WeakKeyDictionary()


def declare_replicated(module_class: type[nn.Module]) -> None:
    """Have FSDP2 leave the parameters and buffers of all modules of a class as they are."""
    try:
        from torch.distributed._composable.contract import REGISTRY_KEY, RegistryItem
    except ImportError:  # not in this PyTorch: a model with sharded deltas raises an error in its first backward pass
        return
    # On the class, so that no instance has to be marked, copied or pickled with it.
    setattr(module_class, REGISTRY_KEY, {_REPLICATED: RegistryItem()})


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP2 is in charge of a module."""
    return bool(getattr(module, MANAGED, False))


def note_sharded(delta: SparseDelta, layer: nn.Module) -> None:
    """From now on the layer that this delta adapts is under FSDP2; moves the delta to where that computes.

    Raises:
        ValueError: the base weight is split within a layer too, or not over all processes, or the deltas themselves
            were to be sharded.
    """
    _refuse_own_unit(delta)
    mesh = _mesh_of(layer)
    _GROUPS[delta] = _group_of(mesh, delta.module_name)
    device_type = mesh.device_type if mesh is not None else None
    if device_type not in (None, "cpu", delta.values.device.type) and not delta.values.is_meta:
        delta.to(torch.device(device_type, torch.get_device_module(device_type).current_device()))


def _refuse_own_unit(delta: SparseDelta) -> None:
    from torch.distributed.fsdp import FSDPModule

    if isinstance(delta, FSDPModule):
        raise ValueError(
            f"{delta.module_name}: fully_shard was called on the module of its deltas, which are not to be sharded; "
            "name the model's blocks instead of a size (auto_wrap_policy='TRANSFORMER_BASED_WRAP'), or set "
            f"min_num_params above {delta.k}"
        )


def is_sharded(delta: SparseDelta) -> bool:
    """Whether the weight that this delta is added to is spread over ranks by FSDP2."""
    return delta in _GROUPS


def sharding_group(delta: SparseDelta) -> Any | None:
    """The process group over which FSDP2 spreads the base weight of a delta; None if it does not."""
    return _GROUPS.get(delta)


def _mesh_of(layer: nn.Module) -> Any | None:
    parameters = [parameter for parameter in layer.parameters() if hasattr(parameter, "device_mesh")]
    for parameter in parameters:
        if sum(not placement.is_replicate() for placement in parameter.placements) > 1:
            raise ValueError(
                "SpIEL cannot adapt weights that tensor parallelism has split: its positions are those of whole "
                "matrices; use FSDP2 (fully_shard) alone"
            )
    return parameters[0].device_mesh if parameters else None


def _group_of(mesh: Any | None, module_name: str) -> Any:
    if mesh is None or mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    if mesh.ndim == 1:
        return mesh.get_group()
    raise ValueError(
        f"{module_name}: its weight is spread over {mesh.size()} of {dist.get_world_size()} processes in "
        f"{mesh.ndim} dimensions ({mesh.mesh_dim_names}); SpIEL needs a mesh of one dimension, or one of all processes"
    )


def refuse_fsdp1(wrapper: nn.Module, wrapped: nn.Module) -> None:
    """Raise a ValueError if the first generation of FSDP is about to spread a model with deltas over processes."""
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if module is None or not isinstance(wrapper, module.FullyShardedDataParallel) or dist.get_world_size() == 1:
        return  # one process keeps everything: loading and saving there works, as PEFT's own tests demand
    if any(isinstance(child, SparseDelta) for child in wrapped.modules()):
        raise ValueError(
            "SpIEL does not work under FullyShardedDataParallel (FSDP1), which flattens all parameters of a block into "
            "one of a single dtype; use FSDP2: fsdp_version=2 in Accelerate's FullyShardedDataParallelPlugin, "
            '`fsdp_version: 2` in its config file, `"fsdp_version": 2` in fsdp_config of TrainingArguments, or '
            "torch.distributed.fsdp.fully_shard"
        )


class ManagedFlag:
    """The attribute `_is_fsdp_managed_module` of a layer: FSDP2 sets it, and the layer's deltas learn of it."""

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
    """The base weight as it is; raises a RuntimeError if a forward pass has found it sharded."""
    if not is_plain(weight):
        raise RuntimeError(
            f"{module_name}: its base weight is sharded. Call the module that was given to fully_shard, whose hooks "
            "gather the weights; for other methods than forward: torch.distributed.fsdp.register_fsdp_forward_method("
            "model, 'generate'). Weights that tensor parallelism has split cannot be adapted"
        )
    return weight


def refuse_merge(weight: Tensor | None, module_name: str) -> None:
    """Raise a ValueError if a base weight that is to be overwritten is sharded."""
    if weight is not None and not is_plain(weight):
        raise ValueError(
            f"{module_name}: cannot merge into a sharded base weight, nothing was changed; save the adapter and merge "
            "it in one process into a model that is not sharded"
        )


declare_replicated(SparseDelta)
