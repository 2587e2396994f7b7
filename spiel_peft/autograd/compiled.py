"""Adapted layers as operators that torch.compile keeps whole: what they do inside is decided when they run."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from spiel_kernels.dispatch import new_library
from spiel_kernels.gather import ConvGeometry

from ..delta import SparseDelta
from ..weights.folding import Pairs, WeightSource
from .functions import gather_delta_gradients, look_up, no_autocast
from .operations import ConvOp, EmbeddingGradient, LinearOp

# Which layer an operator is about, and how operators are registered.


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


# Operators for linear layers and convolutions.


_LINEAR, _TRANSPOSED, _CONV = 0, 1, 2


def encode(op: LinearOp | ConvOp) -> list[int]:
    """The operation as a list of numbers, which is what a graph can hold.

    ``[kind]``; for a convolution ``[kind, dimensions, *stride, *padding, *dilation, groups]``.
    """
    if isinstance(op, LinearOp):
        return [_TRANSPOSED if op.transposed else _LINEAR]
    g = op.geometry
    return [_CONV, len(g.stride), *g.stride, *g.padding, *g.dilation, g.groups]


def _decode(code: Sequence[int], weight_shape: Sequence[int]) -> LinearOp | ConvOp:
    if code[0] != _CONV:
        return LinearOp(transposed=code[0] == _TRANSPOSED)
    n = code[1]
    stride, padding, dilation = (tuple(code[2 + i * n : 2 + (i + 1) * n]) for i in range(3))
    return ConvOp(ConvGeometry(tuple(weight_shape), stride, padding, dilation, code[-1]))


define(
    "adapted(Tensor x, Tensor weight, Tensor? bias, Tensor[] indices, Tensor[] values, Tensor number, int[] code, "
    "int[] weight_shape) -> Tensor"
)
define(
    "adapted_grad_input(Tensor grad_out, Tensor x, Tensor weight, Tensor[] indices, Tensor[] values, Tensor number, "
    "int[] code, int[] weight_shape) -> Tensor"
)
define(
    "adapted_grad_values(Tensor grad_out, Tensor x, Tensor[] indices, Tensor[] values, Tensor number, int[] code, "
    "int[] weight_shape, bool[] needed) -> Tensor[]"
)


def _adapted(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    number: Tensor,
    code: Sequence[int],
    weight_shape: Sequence[int],
) -> Tensor:
    source, op = find_layer(number).weight_source(x.dtype), _decode(code, weight_shape)
    with no_autocast(x):
        pairs = detached_pairs(indices, values)
        return source.use(pairs, x.dtype, lambda adapted: op.forward(x, adapted, bias))


def _fake_adapted(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    number: Tensor,
    code: Sequence[int],
    weight_shape: Sequence[int],
) -> Tensor:
    return _decode(code, weight_shape).forward(x, x.new_empty(tuple(weight_shape)), bias)


def _grad_input(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    number: Tensor,
    code: Sequence[int],
    weight_shape: Sequence[int],
) -> Tensor:
    source, op = find_layer(number).weight_source(x.dtype), _decode(code, weight_shape)
    with no_autocast(x):
        pairs = detached_pairs(indices, values)
        return source.use(pairs, x.dtype, lambda adapted: op.grad_input(grad_out, adapted, x.shape).contiguous())


def _fake_grad_input(grad_out: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _grad_values(
    grad_out: Tensor,
    x: Tensor,
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    number: Tensor,
    code: Sequence[int],
    weight_shape: Sequence[int],
    needed: Sequence[bool],
) -> list[Tensor]:
    deltas = owners_of(find_layer(number), values)
    gradient = _decode(code, weight_shape).gradient(grad_out, x)
    with no_autocast(x):
        gathered = gather_delta_gradients(deltas, gradient, detached_pairs(indices, values), needed)
    return [grad for grad in gathered if grad is not None]


def _fake_grad_values(
    grad_out: Tensor,
    x: Tensor,
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    number: Tensor,
    code: Sequence[int],
    weight_shape: Sequence[int],
    needed: Sequence[bool],
) -> list[Tensor]:
    return [torch.empty_like(v) for v, need in zip(values, needed, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, indices, values, number, code, weight_shape = inputs
    ctx.counts = len(indices)
    ctx.has_bias = bias is not None
    ctx.code, ctx.weight_shape = code, weight_shape
    ctx.needed = [v.requires_grad for v in values]
    ctx.save_for_backward(x, weight, number, *indices, *values)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    x, weight, number, *flat = ctx.saved_tensors
    indices, values = flat[: ctx.counts], flat[ctx.counts :]
    op = _decode(ctx.code, ctx.weight_shape)
    grad_x = grad_bias = None
    ops = torch.ops.spiel_peft
    if ctx.needs_input_grad[0]:
        grad_x = ops.adapted_grad_input(grad_out, x, weight, indices, values, number, ctx.code, ctx.weight_shape)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = op.grad_bias(grad_out)
    grads: list[Tensor | None] = [None] * ctx.counts
    if any(ctx.needed):
        gathered = iter(
            ops.adapted_grad_values(grad_out, x, indices, values, number, ctx.code, ctx.weight_shape, ctx.needed)
        )
        grads = [next(gathered) if need else None for need in ctx.needed]
    return grad_x, None, grad_bias, [None] * ctx.counts, grads, None, None, None


for _name, _function, _fake in (
    ("adapted", _adapted, _fake_adapted),
    ("adapted_grad_input", _grad_input, _fake_grad_input),
    ("adapted_grad_values", _grad_values, _fake_grad_values),
):
    implement(_name, _function, _fake)
torch.library.register_autograd(f"{NAMESPACE}::adapted", _backward, setup_context=_setup_context, lib=library)


def adapted_operator(
    number: Tensor,
    op: LinearOp | ConvOp,
    weight: Tensor,
    weight_shape: Sequence[int],
    deltas: Sequence[SparseDelta],
    x: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """`spiel_peft.autograd.functions.adapted_forward` for graphs of torch.compile.

    Args:
        number: of the layer, from `number_of`.
        op: what is done with the weight.
        weight: the base layer's parameter as it is stored, so that graphs keep it alive and follow its moves.
        weight_shape: shape of the matrix that it stands for.
        deltas: in use.
        x: ``[..., in]`` in the compute dtype; bias: ``[out]`` or None, cast to it.
    """
    bias = bias.to(x.dtype) if bias is not None else None
    indices, values = [d.indices for d in deltas], [d.values for d in deltas]
    return torch.ops.spiel_peft.adapted(x, weight, bias, indices, values, number, encode(op), list(weight_shape))


# Operators for embedding tables.


define(
    "embedding(Tensor ids, Tensor weight, Tensor[] indices, Tensor[] values, Tensor number, int padding_idx, "
    "bool by_frequency) -> Tensor"
)
define(
    "embedding_grad_values(Tensor grad_out, Tensor ids, Tensor[] indices, Tensor[] values, Tensor number, "
    "int padding_idx, bool by_frequency, bool[] needed) -> Tensor[]"
)


def _embedding(
    ids: Tensor,
    weight: Tensor,
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    number: Tensor,
    padding_idx: int,
    by_frequency: bool,
) -> Tensor:
    source = find_layer(number).weight_source(weight.dtype)
    return look_up(source.unchanged(), detached_pairs(indices, values), ids, source.dtype)


def _fake_embedding(ids: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _embedding_grad_values(
    grad_out: Tensor,
    ids: Tensor,
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    number: Tensor,
    padding_idx: int,
    by_frequency: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    gradient = EmbeddingGradient(grad_out, ids, padding_idx if padding_idx >= 0 else None, by_frequency)
    gathered = gather_delta_gradients(
        owners_of(find_layer(number), values), gradient, detached_pairs(indices, values), needed
    )
    return [grad for grad in gathered if grad is not None]


def _fake_embedding_grad_values(
    grad_out: Tensor,
    ids: Tensor,
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    number: Tensor,
    padding_idx: int,
    by_frequency: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    return [torch.empty_like(v) for v, need in zip(values, needed, strict=True) if need]


def _setup_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, _, indices, values, number, *ctx.args = inputs
    ctx.counts = len(indices)
    ctx.needed = [v.requires_grad for v in values]
    ctx.save_for_backward(ids, number, *indices, *values)


def _embedding_backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    ids, number, *flat = ctx.saved_tensors
    gathered = iter(
        torch.ops.spiel_peft.embedding_grad_values(
            grad_out, ids, flat[: ctx.counts], flat[ctx.counts :], number, *ctx.args, ctx.needed
        )
    )
    grads = [next(gathered) if need else None for need in ctx.needed]
    return None, None, [None] * ctx.counts, grads, None, None, None


implement("embedding", _embedding, _fake_embedding)
implement("embedding_grad_values", _embedding_grad_values, _fake_embedding_grad_values)
torch.library.register_autograd(
    f"{NAMESPACE}::embedding", _embedding_backward, setup_context=_setup_embedding, lib=library
)


def embedding_operator(
    number: Tensor,
    weight: Tensor,
    deltas: Sequence[SparseDelta],
    ids: Tensor,
    padding_idx: int | None,
    by_frequency: bool,
) -> Tensor:
    """`adapted_embedding` of `functions` for graphs of torch.compile; arguments as in `adapted_operator`."""
    indices, values = [d.indices for d in deltas], [d.values for d in deltas]
    padding = -1 if padding_idx is None else padding_idx
    return torch.ops.spiel_peft.embedding(ids, weight, indices, values, number, padding, by_frequency)


# Adapted layers as operators that torch.compile keeps whole: what they do inside is decided when they run.
#
# A graph refers to a layer by number, so that it does not depend on the state of a cycle: regrowth changes indices in
# place and compiles nothing anew. The number travels in a tensor, as a Python number would be a constant of the graph
# and layers that are alike could not share one.
