"""Inspects, reads, writes and backs up the weights of base layers: all that differs between kinds of layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spiel_kernels import write_entries

LINEAR, TRANSPOSED, EMBEDDING, CONV = "linear", "transposed", "embedding", "conv"
PARAMETER = "parameter"
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SUPPORTED = (
    "torch.nn.Linear, transformers' Conv1D, torch.nn.Embedding, torch.nn.Conv1d/2d/3d, bitsandbytes' Linear4bit and "
    "Linear8bitLt, and layers that PEFT can dequantize"
)


@dataclass(frozen=True)
class BaseInfo:
    """Describes the weight of a base layer.

    Attributes:
        kind: how the weight is used: LINEAR, TRANSPOSED, EMBEDDING or CONV; PARAMETER for a bare parameter.
        weight_shape: shape as stored; for a quantized weight the dequantized shape.
        fan_in, fan_out: LoRA of rank r trains r * fan_in and r * fan_out values here.
        backend: PEFT's quantization backend, None for a plain weight.
        experts: how many matrices of these sizes the weight holds; 1 for all but fused experts.
    """

    kind: str
    weight_shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    backend: QuantizationBackend | None
    experts: int = 1

    @property
    def numel(self) -> int:
        return math.prod(self.weight_shape)

    @property
    def values_per_rank(self) -> int:
        """Trainable values that PEFT's LoRA has here for each unit of its rank."""
        return self.experts * (self.fan_in + self.fan_out)


def inspect_base(module: nn.Module, quantization_kwargs: dict[str, Any] | None = None) -> BaseInfo | str:
    """Describe a layer that can carry a sparse delta; for another one, return a phrase that says why it cannot."""
    if isinstance(module, BaseTunerLayer):
        return "carries adapters of another method; add the SpIEL adapter first, or merge those"
    if hasattr(module, "parametrizations"):
        return "has a parametrized weight; remove the parametrization first"
    backend = resolve_quantization_backend(module, **(quantization_kwargs or {}))
    if backend is not None:
        return _inspect_quantized(module, backend)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return _not_supported(module)
    info = _inspect_plain(module, weight)
    if isinstance(info, str):
        return info
    if not isinstance(weight, nn.Parameter):
        return "computes its weight before every forward pass (weight_norm, spectral_norm); remove that first"
    if weight.dtype not in FLOAT_DTYPES:
        return (
            f"stores its weight as {weight.dtype}, which cannot be read as a matrix of numbers, and no quantization "
            "backend of PEFT knows this layer"
        )
    return info


def _inspect_quantized(module: nn.Module, backend: QuantizationBackend) -> BaseInfo | str:
    if not backend.supports_merge:
        return f"is quantized with {backend.backend_name}, whose weights PEFT cannot dequantize"
    if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
        return f"is quantized with {backend.backend_name} but has no in_features and out_features"
    shape = (int(module.out_features), int(module.in_features))
    weight = getattr(module, "weight", None)
    problem = _inspect_bitsandbytes(weight, shape) if isinstance(weight, Tensor) and not weight.is_meta else None
    return problem or BaseInfo(LINEAR, shape, shape[1], shape[0], backend)


def _inspect_bitsandbytes(weight: Tensor, shape: tuple[int, int]) -> str | None:
    quant_state = getattr(weight, "quant_state", None)
    unquantized = hasattr(weight, "quant_state") and quant_state is None
    if unquantized or (hasattr(weight, "SCB") and weight.dtype != torch.int8):
        return "has not been quantized yet; move it to its device first (8-bit: with has_fp16_weights=False)"
    if quant_state is not None and tuple(quant_state.shape) != shape:
        return f"holds a packed weight of shape {tuple(quant_state.shape)}, not {shape}"
    return None


def memory_of(tensor: Tensor) -> tuple[int, int, int]:
    """An identity of the memory that a tensor lies in, and the tensor's first byte and the end of its last one there.

    A tensor without plain memory of its own, such as one on the meta device or a sharded one, is all of its memory.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or not tensor.numel():
        return id(tensor), 0, 1
    address = tensor.untyped_storage().data_ptr()
    if not address:
        return id(tensor), 0, 1
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.storage_offset()
    return address, begin * tensor.element_size(), (begin + reach + 1) * tensor.element_size()


def repeats_memory(tensor: Tensor) -> bool:
    """Whether several entries of a tensor may lie in the same memory, as those of an expanded one do."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step <= reach:
            return True
        reach += (size - 1) * step
    return False


def keep_readable(module: nn.Module) -> None:
    """Undo and prevent the repacking of a 4-bit weight, which bitsandbytes does at the first evaluation on some CPUs.

    bitsandbytes' `dequantize_4bit`, and so PEFT, would read the repacked bytes as if they were in the usual order.
    """
    if not hasattr(module, "support_avx512bf16_for_cpu"):
        return
    module.support_avx512bf16_for_cpu = False
    packed = getattr(module.weight, "quant_state", None)
    if not getattr(packed, "packing_format_for_cpu", False):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    # Repacking has rounded the scales to bfloat16. They stay so: quantizing them again would lose more.
    state = copy.copy(packed)
    state.original_nested, state.state2, state.offset = False, None, None
    module.weight.data, state = _convert_weight_packed_for_cpu_inverse(module.weight.data, state)
    state.absmax = packed.absmax.T.flatten().float()
    module.weight.quant_state = module.quant_state = state


def _inspect_plain(module: nn.Module, weight: Tensor) -> BaseInfo | str:
    shape = tuple(weight.shape)
    if 0 in shape:
        return f"has an empty weight of shape {shape}"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "belongs to nn.MultiheadAttention, which reads the weight without calling the layer"
    if isinstance(module, nn.Linear):
        return BaseInfo(LINEAR, shape, shape[1], shape[0], None)
    if isinstance(module, Conv1D):
        return BaseInfo(TRANSPOSED, shape, shape[0], shape[1], None)
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "is an embedding with max_norm, which rewrites its weight in every forward pass"
        return BaseInfo(EMBEDDING, shape, shape[1], shape[0], None)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return BaseInfo(CONV, shape, math.prod(shape[1:]), shape[0], None)
    return _not_supported(module)


def _not_supported(module: nn.Module) -> str:
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    hint = f"; target_parameters can name its parameters ({', '.join(names[:3])})" if names else ""
    return f"is not a supported layer{hint}"


def offload_hook(module: nn.Module) -> Any | None:
    """The hook with which accelerate offloads the parameters of a layer; None if they are not offloaded."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return None
    return next((h for h in getattr(hook, "hooks", (hook,)) if getattr(h, "offload", False)), None)


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Bring offloaded parameters of a layer to its execution device for the length of a block."""
    hook = offload_hook(module)
    if hook is None or not any(p.is_meta for p in module.parameters(False)):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, torch.tensor([]))


@contextmanager
def writable(layer: Any) -> Iterator[None]:
    """Bring in the offloaded base weight of a layer, and store it offloaded again at the end of the block."""
    base = layer.get_base_layer()
    if not any(p.is_meta for p in base.parameters(False)):
        yield
        return
    with onload_layer(layer):
        if any(p.is_meta for p in base.parameters(False)):
            raise RuntimeError(
                f"{layer.module_name}: cannot write to a base weight that is offloaded or on the meta device; load it "
                "first (accelerate's remove_hook_from_submodules)"
            )
        yield


def run_with_hooks(base: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `forward` in place of the base layer's own one, with all hooks of the base layer around it."""
    hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    hooked = hooked or torch.nn.modules.module._has_any_global_hook()
    accelerated = "_hf_hook" in base.__dict__ and hasattr(base, "_old_forward")
    if not hooked and not accelerated:
        return forward(*args, **kwargs)
    # accelerate has put its wrapper in `forward`, which calls the layer's own method as `_old_forward`.
    name = "_old_forward" if accelerated else "forward"
    own = base.__dict__.get(name)
    base.__dict__[name] = forward
    try:
        return base(*args, **kwargs)
    finally:
        if own is None:
            del base.__dict__[name]
        else:
            base.__dict__[name] = own


class WeightBackup(Protocol):
    """The original of a merged weight, kept until it is restored bit for bit."""

    def restore(self, layer: Any) -> None:
        """Put the original back into the layer's base."""


class EntryBackup:
    """The entries of a plain weight that a merge overwrote: int64 positions ``[u]``, originals in W's dtype."""

    def __init__(self, positions: Tensor, originals: Tensor) -> None:
        self.positions = positions
        self.originals = originals

    def restore(self, layer: Any) -> None:
        weight = layer.get_base_layer().weight.detach()
        write_entries(weight, self.positions.to(weight.device), self.originals.to(weight.device, weight.dtype))


class ParameterBackup:
    """The parameter that a layer shares with other modules; while merged, the layer has a parameter of its own."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    def restore(self, layer: Any) -> None:
        layer.get_base_layer().weight = self.parameter


class QuantizedBackup:
    """A quantized parameter with its packed bytes and quantization state, on the CPU while merged.

    A layer of HQQ has no parameter `weight`; writing to it makes another layer, so the layer itself is kept.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.parameter = getattr(base, "weight", None)
        if self.parameter is None:
            return
        # PEFT writes a new 4-bit weight by changing attributes of the old parameter and of the layer.
        self.attributes = dict(vars(base.weight))
        self.quant_state = getattr(base, "quant_state", None)
        state = getattr(base, "state", None)
        self.state = {name: getattr(state, name) for name in ("CB", "SCB") if hasattr(state, name)}

    def pack_away(self) -> None:
        """Move the original to the CPU; to be called when the merged weight is in place."""
        if self.parameter is not None:
            self._move(torch.device("cpu"))

    def restore(self, layer: Any) -> None:
        if self.parameter is None:
            layer.base_layer = self.base
            return
        self._move(layer.get_base_layer().weight.device)
        base = layer.base_layer = self.base
        vars(self.parameter).clear()
        vars(self.parameter).update(self.attributes)
        base.weight = self.parameter
        if hasattr(base, "quant_state"):
            base.quant_state = self.quant_state
        for name, value in self.state.items():
            setattr(base.state, name, value)

    def _move(self, device: torch.device) -> None:
        if self.parameter.device == device:
            return
        if not {"quant_state", "SCB"} & set(self.attributes):
            self.parameter = nn.Parameter(self.parameter.to(device), requires_grad=False)
            return
        # The parameter's own `to` would lose the scales of an 8-bit weight after its first forward pass.
        self.parameter.data = self.parameter.data.to(device)
        for values in (self.attributes, self.state):
            for name, value in values.items():
                if isinstance(value, Tensor):
                    values[name] = value.to(device)
                elif name == "quant_state" and value is not None:
                    value.to(device)  # in place
