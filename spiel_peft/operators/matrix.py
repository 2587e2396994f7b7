"""Operators for linear layers and convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spiel_kernels.gather import ConvGeometry

from ..delta import SparseDelta
from ..functional import gather_delta_gradients, no_autocast
from ..weight_ops import ConvOp, LinearOp
from .registry import NAMESPACE, define, detached_pairs, find_layer, implement, library, owners_of

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
    """`spiel_peft.functional.adapted_forward` for graphs of torch.compile.

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
