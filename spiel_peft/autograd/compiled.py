"""Adapted layers as operators that torch.compile keeps whole: what they do inside is decided when they run.

A graph refers to a layer by a number. It does not hold the positions of the deltas, so that regrowth, which changes
indices in place, compiles nothing anew. The number travels in a tensor: a Python number would be a constant of the
graph, and layers that are alike could not share a graph.

Inside, the operators call the functions of `spiel_peft.autograd.functions`.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from spiel_kernels.dispatch import new_library, tags_of
from spiel_kernels.gather import ConvGeometry

from ..delta import SparseDelta
from ..weights.folding import Pairs, WeightSource
from .functions import expect_gradients, in_places, input_gradient, layer_output, value_gradients
from .operations import ConvOp, EmbeddingOp, LinearOp, WeightOp

NAMESPACE = "spiel_peft"


class AdaptedLayer(Protocol):
    """What an operator needs to know of a layer when it runs."""

    spiel_delta: Any
    module_name: str
    weight_source: WeightSource


_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_library = new_library(NAMESPACE)


def number_of(layer: AdaptedLayer) -> Tensor:
    """A number, in a tensor, under which operators find the layer as long as it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number)


def _find_layer(number: Tensor) -> AdaptedLayer:
    layer = _layers.get(int(number))
    if layer is None:
        raise RuntimeError("a compiled model refers to a SpIEL layer that is gone; compile the model again")
    return layer


def _owners_of(layer: AdaptedLayer, values: Sequence[Tensor]) -> list[SparseDelta]:
    """The deltas that hold these values: another adapter may have become the active one since the forward pass."""
    owners = {delta.values.data_ptr(): delta for delta in layer.spiel_delta.values()}
    if any(v.data_ptr() not in owners for v in values):
        raise RuntimeError(f"{layer.module_name}: an adapter was deleted between a forward pass and its backward pass")
    return [owners[v.data_ptr()] for v in values]


def _pairs(indices: Sequence[Tensor], values: Sequence[Tensor]) -> Pairs:
    return list(zip(indices, [v.detach() for v in values], strict=True))


_LINEAR, _TRANSPOSED, _CONV, _EMBEDDING = range(4)


def _encode(op: WeightOp) -> list[int]:
    """The operation as a list of numbers, which a graph can hold.

    ``[kind]`` for a linear layer, ``[kind, dimensions, *stride, *padding, *dilation, groups]`` for a convolution,
    ``[kind, padding_idx or -1, by_frequency]`` for an embedding.
    """
    if isinstance(op, LinearOp):
        return [_TRANSPOSED if op.transposed else _LINEAR]
    if isinstance(op, EmbeddingOp):
        return [_EMBEDDING, -1 if op.padding_idx is None else op.padding_idx, int(op.by_frequency)]
    g = op.geometry
    return [_CONV, len(g.stride), *g.stride, *g.padding, *g.dilation, g.groups]


def _decode(code: Sequence[int], weight_shape: Sequence[int]) -> WeightOp:
    kind = code[0]
    if kind == _EMBEDDING:
        return EmbeddingOp(weight_shape[0], code[1] if code[1] >= 0 else None, bool(code[2]))
    if kind != _CONV:
        return LinearOp(transposed=kind == _TRANSPOSED)
    n = code[1]
    stride, padding, dilation = (tuple(code[2 + i * n : 2 + (i + 1) * n]) for i in range(3))
    return ConvOp(ConvGeometry(tuple(weight_shape), stride, padding, dilation, code[-1]))


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
    layer = _find_layer(number)
    source = layer.weight_source
    op = _decode(code, weight_shape)
    expect_gradients(op, _owners_of(layer, values), x)
    return layer_output(op, source, source.state(x.dtype), _pairs(indices, values), x, bias)


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
    op = _decode(code, weight_shape)
    if isinstance(op, EmbeddingOp):
        return weight.new_empty((*x.shape, weight_shape[1]))
    return op.forward(x, x.new_empty(tuple(weight_shape)), bias)


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
    source, op = _find_layer(number).weight_source, _decode(code, weight_shape)
    pairs, state = _pairs(indices, values), source.state(x.dtype)
    return input_gradient(op, source, state, pairs, grad_out, x.shape, x.dtype).contiguous()


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
    deltas = _owners_of(_find_layer(number), values)
    gradient = _decode(code, weight_shape).gradient(grad_out, x)
    gradients = value_gradients(deltas, gradient, _pairs(indices, values), needed)
    return [gradient for gradient in gradients if gradient is not None]


def _fake_grad_values(
    grad_out: Tensor, x: Tensor, indices: Sequence[Tensor], values: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    return [torch.empty_like(v) for v, need in zip(values, rest[-1], strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, indices, values, number, code, weight_shape = inputs
    ctx.counts = len(indices)
    ctx.has_bias = bias is not None
    ctx.code, ctx.weight_shape = code, weight_shape
    ctx.needed = [v.requires_grad for v in values]
    ctx.save_for_backward(x, weight, number, *indices, *values)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    """The gradients, by operators again: this function is part of the graph."""
    x, weight, number, *flat = ctx.saved_tensors
    indices, values = flat[: ctx.counts], flat[ctx.counts :]
    grad_x = grad_bias = None
    grads: list[Tensor | None] = [None] * ctx.counts
    ops = torch.ops.spiel_peft
    if ctx.needs_input_grad[0]:
        grad_x = ops.adapted_grad_input(grad_out, x, weight, indices, values, number, ctx.code, ctx.weight_shape)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = _decode(ctx.code, ctx.weight_shape).grad_bias(grad_out)
    if any(ctx.needed):
        gathered = ops.adapted_grad_values(grad_out, x, indices, values, number, ctx.code, ctx.weight_shape, ctx.needed)
        grads = in_places(ctx.needed, gathered)
    return grad_x, None, grad_bias, [None] * ctx.counts, grads, None, None, None


def _define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator for all devices. `fake` returns empty tensors of its outputs' shapes."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=tags_of(schema, decides_at_run_time=True))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


_define(
    "adapted(Tensor x, Tensor weight, Tensor? bias, Tensor[] indices, Tensor[] values, Tensor number, int[] code, "
    "int[] weight_shape) -> Tensor",
    _adapted,
    _fake_adapted,
)
_define(
    "adapted_grad_input(Tensor grad_out, Tensor x, Tensor weight, Tensor[] indices, Tensor[] values, Tensor number, "
    "int[] code, int[] weight_shape) -> Tensor",
    _grad_input,
    _fake_grad_input,
)
_define(
    "adapted_grad_values(Tensor grad_out, Tensor x, Tensor[] indices, Tensor[] values, Tensor number, int[] code, "
    "int[] weight_shape, bool[] needed) -> Tensor[]",
    _grad_values,
    _fake_grad_values,
)
torch.library.register_autograd(f"{NAMESPACE}::adapted", _backward, setup_context=_setup_context, lib=_library)


def adapted_operator(
    number: Tensor,
    op: WeightOp,
    weight: Tensor,
    weight_shape: Sequence[int],
    deltas: Sequence[SparseDelta],
    x: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """`spiel_peft.autograd.functions.adapted_forward` for graphs of torch.compile.

    Args:
        number: of the layer, from `number_of`.
        op: what the layer computes with its weight.
        weight: the base layer's parameter as it is stored, so that graphs keep it alive and follow its moves.
        weight_shape: shape of the matrix that it stands for.
        deltas: to add.
        x: ``[..., in]`` in the compute dtype; integer ids for an embedding.
        bias: ``[out]`` of any dtype, cast to the compute dtype; None for an embedding.
    """
    bias = bias.to(x.dtype) if bias is not None else None
    pairs = [delta.pair() for delta in deltas]
    indices, values = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return torch.ops.spiel_peft.adapted(x, weight, bias, indices, values, number, _encode(op), list(weight_shape))
