"""Forward and backward through an adapted weight: only what needs a gradient gets one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spiel_kernels import apply_deltas

from ..delta import SparseDelta, WeightGradient
from ..weights.folding import Pairs, WeightSource
from .operations import ConvOp, DenseGradient, EmbeddingGradient, LinearOp


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """What is computed inside runs in the dtype of its operands."""
    device = x.device.type
    # Entering autocast costs more than asking for it.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def gather_delta_gradients(
    deltas: Sequence[SparseDelta], gradient: WeightGradient | None, pairs: Pairs, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradient of each delta's values, None where it is not needed.

    Collectors say first at which other positions they want the weight gradient: all are gathered in one go.
    """
    if len(pairs) == 1 and needed[0]:
        return [_gradient_of_one(deltas[0], gradient, *pairs[0])]
    asked = [(delta, *pair) for delta, pair, need in zip(deltas, pairs, needed, strict=True) if need]
    if not asked:
        return [None] * len(pairs)
    extra = [_positions_wanted(delta, gradient) for delta, _, _ in asked]
    sets = [indices for _, indices, _ in asked] + [positions for positions in extra if positions is not None]
    gathered = iter(gradient.gather_sets(sets))
    active = [next(gathered) for _ in asked]
    for (delta, _, _), own, positions in zip(asked, active, extra, strict=True):
        if positions is not None:
            delta.collector.collect(delta, own, next(gathered))
    grads = iter(own.to(values.dtype) for own, (_, _, values) in zip(active, asked, strict=True))
    return [next(grads) if need else None for need in needed]


def _positions_wanted(delta: SparseDelta, gradient: WeightGradient) -> Tensor | None:
    collector = delta.collector
    if collector is None:
        return None
    collector.prepare(delta, gradient)
    return collector.wanted(delta)


def _gradient_of_one(delta: SparseDelta, gradient: WeightGradient, indices: Tensor, values: Tensor) -> Tensor:
    """The same for the usual case. Every instruction counts: a large matrix product has just emptied the caches."""
    positions = _positions_wanted(delta, gradient)
    if positions is None:
        (own,) = gradient.gather_sets((indices,))
    else:
        own, at_positions = gradient.gather_sets((indices, positions))
        delta.collector.collect(delta, own, at_positions)
    return own if own.dtype == values.dtype else own.to(values.dtype)


def delta_gradients(ctx: Any, gradient: WeightGradient | None, pairs: Pairs) -> list[Tensor | None]:
    """What a backward pass returns for `flat`, its last inputs: nothing for indices, gradients for values."""
    needed = ctx.needs_input_grad[-len(pairs) :]
    return [None] * len(pairs) + gather_delta_gradients(ctx.deltas, gradient, pairs, needed)


def pairs_of(tensors: Sequence[Tensor]) -> Pairs:
    half = len(tensors) // 2
    return list(zip(tensors[:half], tensors[half:], strict=True))


class _Adapted(torch.autograd.Function):
    """y = op(x, W + deltas, b)."""

    @staticmethod
    def forward(
        ctx: Any,
        op: LinearOp | ConvOp,
        source: WeightSource,
        deltas: list[SparseDelta],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *flat: Tensor,
    ) -> Tensor:
        # weight is here for its gradient alone, in case it is trained too; flat: all indices, then all values
        half = len(flat) // 2
        trains = any(ctx.needs_input_grad[6 + half :]) or ctx.needs_input_grad[4]
        ctx.op, ctx.source, ctx.deltas = op, source, deltas
        ctx.compute_dtype, ctx.x_shape = x.dtype, x.shape
        pairs = pairs_of(flat)
        with no_autocast(x):
            out, shape = source.use(pairs, x.dtype, lambda adapted: (op.forward(x, adapted, bias), adapted.shape))
        # After the product, which has brought x into the caches.
        k = sum(indices.numel() for indices, _ in pairs)
        ctx.save_for_backward(op.activation(x, shape, k) if trains else None, *flat)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, *flat = ctx.saved_tensors
        pairs = pairs_of(flat)
        needs = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        with no_autocast(grad_out):
            if needs[3]:
                grad_x = ctx.source.use(
                    pairs, ctx.compute_dtype, lambda adapted: ctx.op.grad_input(grad_out, adapted, ctx.x_shape)
                )
            if needs[5]:
                grad_bias = ctx.op.grad_bias(grad_out)
            gradient = ctx.op.gradient(grad_out, x) if x is not None else None
            if needs[4]:
                grad_weight = gradient.dense()
            grads = delta_gradients(ctx, gradient, pairs)
        return (None, None, None, grad_x, grad_weight, grad_bias, *grads)


def look_up(table: Tensor, pairs: Pairs, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (integer, any shape) of a table with deltas, ``[*ids.shape, width]``; reads only the rows in use."""
    width = table.shape[1]
    rows, inverse = torch.unique(ids, return_inverse=True)
    slot_of_row = torch.full((table.shape[0],), -1, dtype=torch.int64, device=ids.device)
    # Before anything is indexed with them: refuses ids that are out of range, negative ones too.
    used_rows = F.embedding(rows, table)
    slot_of_row[rows] = torch.arange(rows.numel(), device=ids.device)
    compact = []
    for indices, values in pairs:
        positions = indices.to(torch.int64)
        slots = slot_of_row[torch.div(positions, width, rounding_mode="floor")]
        used = (slots >= 0).nonzero().flatten()
        compact.append((slots[used] * width + positions[used] % width, values[used]))
    return apply_deltas(used_rows, compact, dtype)[inverse]


class _AdaptedEmbedding(torch.autograd.Function):
    """y = (W + deltas)[ids]; only the rows in use are read."""

    @staticmethod
    def forward(
        ctx: Any,
        source: WeightSource,
        deltas: list[SparseDelta],
        ids: Tensor,
        weight: Tensor | None,
        padding_idx: int | None,
        by_frequency: bool,
        *flat: Tensor,
    ) -> Tensor:
        full = source.unchanged()
        ctx.deltas, ctx.args, ctx.weight_shape = deltas, (padding_idx, by_frequency), full.shape
        ctx.save_for_backward(ids, *flat)
        return look_up(full, pairs_of(flat), ids, source.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        ids, *flat = ctx.saved_tensors
        pairs = pairs_of(flat)
        needs = ctx.needs_input_grad
        gradient = EmbeddingGradient(grad_out, ids, *ctx.args)
        grad_weight = None
        if needs[3]:
            grad_weight = torch.ops.aten.embedding_dense_backward(
                grad_out, ids, ctx.weight_shape[0], -1 if ctx.args[0] is None else ctx.args[0], ctx.args[1]
            )
        grads = delta_gradients(ctx, gradient, pairs)
        return (None, None, None, grad_weight, None, None, *grads)


class _FoldedWeight(torch.autograd.Function):
    """W + deltas as a tensor, for layers whose forward pass is their own: their weight gradient is dense."""

    @staticmethod
    def forward(ctx: Any, source: WeightSource, deltas: list[SparseDelta], weight: Tensor, *flat: Tensor) -> Tensor:
        ctx.deltas = deltas
        ctx.save_for_backward(*flat)
        return source.adapted(pairs_of(flat))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        pairs = pairs_of(ctx.saved_tensors)
        needs = ctx.needs_input_grad
        gradient = DenseGradient(grad_out)
        grads = delta_gradients(ctx, gradient, pairs)
        return (None, None, grad_out if needs[2] else None, *grads)


def tensors_of(deltas: list[SparseDelta]) -> list[Tensor]:
    called = [delta() for delta in deltas]
    return [indices for indices, _ in called] + [values for _, values in called]


# The autograd functions hold modules and callables, which torch.compile cannot trace: it runs them as they are. What
# keeps it out costs eager calls more than asking whether it is there.
_adapted_outside_graph = torch.compiler.disable(_Adapted.apply)
_embedding_outside_graph = torch.compiler.disable(_AdaptedEmbedding.apply)
_folded_outside_graph = torch.compiler.disable(_FoldedWeight.apply)


def adapted_forward(
    op: LinearOp | ConvOp,
    source: WeightSource,
    deltas: list[SparseDelta],
    x: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Apply `op` with the adapted weight. x has the compute dtype; the bias is cast to it.

    Gradients flow to x, the bias, the deltas' values and, if it requires one, the base weight.
    """
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    weight = source.parameter if source.parameter is not None and source.parameter.requires_grad else None
    apply = _adapted_outside_graph if torch.compiler.is_compiling() else _Adapted.apply
    return apply(op, source, deltas, x, weight, bias, *tensors_of(deltas))


def adapted_embedding(
    source: WeightSource,
    deltas: list[SparseDelta],
    ids: Tensor,
    padding_idx: int | None,
    by_frequency: bool,
) -> Tensor:
    """Look `ids` (integer, any shape) up in the adapted table; returns ``[*ids.shape, width]``."""
    apply = _embedding_outside_graph if torch.compiler.is_compiling() else _AdaptedEmbedding.apply
    return apply(source, deltas, ids, source.parameter, padding_idx, by_frequency, *tensors_of(deltas))


def folded_weight(source: WeightSource, deltas: list[SparseDelta]) -> Tensor:
    """The adapted weight as a tensor that passes its (dense) gradient on to the deltas."""
    apply = _folded_outside_graph if torch.compiler.is_compiling() else _FoldedWeight.apply
    return apply(source, deltas, source.parameter, *tensors_of(deltas))
