"""Building blocks of the tests: small models, dense counterparts of sparse layers, a record of tensor operations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from spiel_peft import SpIELConfig, SpIELLayer

HALF_AND_FULL = [torch.float32, torch.bfloat16, torch.float16]


class Single(nn.Module):
    """A model of one layer, `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapt(layer: nn.Module, k: int = 7, adapters: tuple[str, ...] = ("default",), **config: Any) -> PeftModel:
    """A PEFT model of one layer with random deltas; every adapter has positions of its own, all are active."""
    config = {"target_modules": ["layer"], "init_weights": False, "growth": "none", **config}
    model: PeftModel | None = None
    for number, name in enumerate(adapters):
        settings = SpIELConfig(num_deltas=k, seed=number, **config)
        if model is None:
            model = get_peft_model(Single(layer), settings, adapter_name=name)
        else:
            model.add_adapter(name, settings)
    model.base_model.set_adapter(list(adapters))
    return model


def spiel_layer(model: nn.Module) -> SpIELLayer:
    """The only SpIEL layer of a model."""
    (layer,) = (module for module in model.modules() if isinstance(module, SpIELLayer))
    return layer


def values_of(model: nn.Module, adapter: str = "default") -> nn.Parameter:
    """The values of an adapter in a model of one layer."""
    return spiel_layer(model).spiel_delta[adapter].values


def dense_delta(layer: SpIELLayer, adapter: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """An adapter's delta as a dense leaf tensor, made entry by entry."""
    delta = layer.spiel_delta[adapter]
    dense = torch.zeros(layer.info.numel, dtype=dtype)
    for position, value in zip(delta.indices.tolist(), delta.values.tolist(), strict=True):
        dense[position] = value
    return dense.view(layer.info.weight_shape).requires_grad_()


@dataclass
class Dense:
    """What the dense formula ``W + sum of deltas`` gives in float64."""

    out: Tensor
    grad_input: Tensor | None
    grad_bias: Tensor | None
    grad_weight: Tensor
    grad_values: dict[str, Tensor]


def dense_formula(
    layer: SpIELLayer, reference: nn.Module, weight: Tensor, x: Tensor, grad_out: Tensor, adapters: tuple[str, ...]
) -> Dense:
    """Run `reference`, a float64 layer, by plain autograd with the adapted weight put in place of its own."""
    deltas = {name: dense_delta(layer, name) for name in adapters}
    weight = weight.detach().double().requires_grad_()
    bias = getattr(reference, "bias", None)
    tensors = {"weight": weight + sum(deltas.values())}
    if bias is not None:
        bias = bias.detach().double().requires_grad_()
        tensors["bias"] = bias
    if x.is_floating_point():
        x = x.detach().double().requires_grad_()
    out = torch.func.functional_call(reference, tensors, (x,))
    out.backward(grad_out.double())
    grads = {
        name: delta.grad.flatten()[layer.spiel_delta[name].indices.to(torch.int64)] for name, delta in deltas.items()
    }
    grad_bias = bias.grad if bias is not None else None
    return Dense(out.detach(), x.grad if x.is_floating_point() else None, grad_bias, weight.grad, grads)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value (0 for empty tensors)."""
    if expected.numel() == 0:
        assert got.shape == expected.shape
        return 0.0
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).abs().max()) / (float(expected.abs().max()) or 1.0)


def assert_close(got: Tensor, expected: Tensor, tolerance: float, name: str = "tensor") -> None:
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    error = relative_error(got, expected)
    assert error <= tolerance, f"{name}: relative error {error:.3g}, allowed {tolerance:.3g}"


def assert_same_bits(got: Tensor, expected: Tensor, name: str = "tensor") -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape, name
    assert torch.equal(got.flatten().view(torch.uint8), expected.flatten().view(torch.uint8)), (
        f"{name}: {int((got != expected).sum())} of {got.numel()} entries differ"
    )


@dataclass
class Op:
    """One tensor operation: its name, the sizes of what it allocated, and the storages that it read."""

    name: str
    out_numels: list[int]
    storages: set[int]


class OpRecorder(TorchDispatchMode):
    """Records every tensor operation that runs, those inside backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in tensors}
        new = [t.numel() for t in made if t.untyped_storage().data_ptr() not in storages]
        self.ops.append(Op(func.overloadpacket.__name__, new, storages))
        return out

    @property
    def largest(self) -> int:
        """Elements of the largest tensor that any operation allocated."""
        return max((n for op in self.ops for n in op.out_numels), default=0)

    def reads(self, tensor: Tensor) -> bool:
        """Whether any operation read the tensor's memory."""
        return any(tensor.untyped_storage().data_ptr() in op.storages for op in self.ops)

    @property
    def matmuls(self) -> list[Op]:
        """Matrix products and convolutions."""
        names = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
        return [op for op in self.ops if op.name in names]


@dataclass(frozen=True)
class LayerCase:
    """A kind of layer and an input for it."""

    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
        layer, x = self.make().to(dtype), self.x()
        return layer, x.to(dtype) if x.is_floating_point() else x


def transposed(rows: int, cols: int) -> Conv1D:
    """transformers' Conv1D with a bias that is not zero."""
    layer = Conv1D(cols, rows)
    nn.init.normal_(layer.bias)
    return layer


def ids(*shape: int, below: int = 11) -> Tensor:
    return torch.randint(below, shape)


CASES: dict[str, LayerCase] = {
    "linear": LayerCase(lambda: nn.Linear(9, 13), lambda: torch.randn(2, 5, 9)),
    "linear-no-bias": LayerCase(lambda: nn.Linear(9, 13, bias=False), lambda: torch.randn(5, 9)),
    "linear-vector": LayerCase(lambda: nn.Linear(9, 13), lambda: torch.randn(9)),
    "linear-one-row": LayerCase(lambda: nn.Linear(9, 1), lambda: torch.randn(4, 9)),
    "transposed": LayerCase(lambda: transposed(9, 13), lambda: torch.randn(2, 5, 9)),
    "embedding": LayerCase(lambda: nn.Embedding(11, 6), lambda: ids(3, 7)),
    "embedding-padding": LayerCase(lambda: nn.Embedding(11, 6, padding_idx=2), lambda: ids(3, 7)),
    "embedding-frequency": LayerCase(lambda: nn.Embedding(11, 6, scale_grad_by_freq=True), lambda: ids(3, 7)),
    "conv1d": LayerCase(lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 10)),
    "conv2d": LayerCase(lambda: nn.Conv2d(3, 8, 3, stride=2), lambda: torch.randn(2, 3, 9, 8)),
    "conv2d-groups": LayerCase(
        lambda: nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding=(1, 2)), lambda: torch.randn(2, 4, 9, 8)
    ),
    "conv3d": LayerCase(lambda: nn.Conv3d(2, 4, (3, 2, 1), bias=False), lambda: torch.randn(2, 2, 5, 4, 3)),
}


def as_reference(layer: nn.Module) -> nn.Module:
    """A float64 copy that shares nothing with the layer."""
    return copy.deepcopy(layer).double()


def tiny_llama(layers: int = 2) -> LlamaForCausalLM:
    """A random LLaMA of a few thousand parameters."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)
