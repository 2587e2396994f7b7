"""Forward and backward passes through adapted weights, in autograd functions for eager mode.

The functions `layer_output`, `input_gradient` and `value_gradients` do the work. The operators for `torch.compile`
(`spiel_peft.autograd.compiled`) call the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spiel_kernels import apply_deltas
from spiel_kernels.dispatch import runs_triton
from spiel_kernels.index_set import rows_and_columns

from ..delta import SparseDelta, WeightGradient
from ..weights.folding import Pairs, WeightSource, WeightState
from .operations import ConvOp, DenseGradient, EmbeddingOp, LinearOp, WeightOp


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Operations inside run in the dtype of their operands."""
    device = x.device.type
    # Entering autocast costs more than asking for it.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def expect_gradients(op: WeightOp, deltas: Sequence[SparseDelta], x: Tensor) -> None:
    """Have all that waits for a GPU done before the backward pass of a layer with this input."""
    if isinstance(op, LinearOp) and runs_triton(x):
        for delta in deltas:
            if delta.collector is not None and delta.values.requires_grad:
                delta.collector.expect(delta, x.dtype)


def layer_output(
    op: WeightOp, source: WeightSource, state: WeightState, pairs: Pairs, x: Tensor, bias: Tensor | None
) -> Tensor:
    """The output of a layer whose weight has deltas added.

    Args:
        op: what the layer computes with its weight.
        source, state: how the weight is read, and the state in which this pass finds it.
        pairs: ``indices`` ``[k]`` and ``values`` ``[k]`` of each delta, not tracked by autograd.
        x: input in the compute dtype; integer ids for an embedding.
        bias: ``[out]`` in the compute dtype, or None.
    """
    if isinstance(op, EmbeddingOp):
        return _look_up(source.unchanged(state), pairs, x, state.dtype)
    with _no_autocast(x):
        return source.use(state, pairs, x.dtype, lambda adapted: op.forward(x, adapted, bias))


def input_gradient(
    op: LinearOp | ConvOp,
    source: WeightSource,
    state: WeightState,
    pairs: Pairs,
    grad_out: Tensor,
    x_shape: torch.Size,
    compute_dtype: torch.dtype,
) -> Tensor:
    """The gradient of a layer's input ``[*x_shape]``; raises a RuntimeError if the weight is not in that state."""
    with _no_autocast(grad_out):
        return source.use(state, pairs, compute_dtype, lambda adapted: op.grad_input(grad_out, adapted, x_shape))


def value_gradients(
    deltas: Sequence[SparseDelta], gradient: WeightGradient | None, pairs: Pairs, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradient of each delta's values, None where it is not needed.

    Each delta's collector is asked first at which other positions it wants the weight gradient. All positions are
    gathered in one go.

    Args:
        deltas, pairs: the deltas of the pass and, for each, its indices and values ``[k]``.
        gradient: the weight gradient; may be None if no delta needs a gradient.
        needed: which of the deltas need a gradient.
    """
    with _no_autocast(pairs[0][1]):
        if len(pairs) == 1 and needed[0]:
            return [_gradient_of_one(deltas[0], gradient, *pairs[0])]
        return in_places(needed, _gradients_of_several(deltas, gradient, pairs, needed))


def _gradients_of_several(
    deltas: Sequence[SparseDelta], gradient: WeightGradient | None, pairs: Pairs, needed: Sequence[bool]
) -> list[Tensor]:
    asked = [(delta, *pair) for delta, pair, need in zip(deltas, pairs, needed, strict=True) if need]
    if not asked:
        return []
    extra = [_positions_wanted(delta, gradient) for delta, _, _ in asked]
    sets = [indices for _, indices, _ in asked] + [positions for positions in extra if positions is not None]
    gathered = iter(gradient.gather_sets(sets))
    active = [next(gathered) for _ in asked]
    for (delta, _, _), own, positions in zip(asked, active, extra, strict=True):
        if delta.collector is not None:
            delta.collector.collect(delta, own, None if positions is None else next(gathered))
    return [own.to(values.dtype) for own, (_, _, values) in zip(active, asked, strict=True)]


def _positions_wanted(delta: SparseDelta, gradient: WeightGradient) -> Tensor | None:
    collector = delta.collector
    if collector is None:
        return None
    collector.prepare(delta, gradient)
    return collector.wanted(delta)


def _gradient_of_one(delta: SparseDelta, gradient: WeightGradient, indices: Tensor, values: Tensor) -> Tensor:
    """`value_gradients` for one delta, the usual case: few instructions, as a matrix product has emptied the caches."""
    positions, at_positions = _positions_wanted(delta, gradient), None
    if positions is None:
        (own,) = gradient.gather_sets((indices,))
    else:
        own, at_positions = gradient.gather_sets((indices, positions))
    if delta.collector is not None:
        delta.collector.collect(delta, own, at_positions)
    return own if own.dtype == values.dtype else own.to(values.dtype)


def in_places(needed: Sequence[bool], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of the deltas that need one, in order, with None for each of the others."""
    rest = iter(gradients)
    return [next(rest) if need else None for need in needed]


def _look_up(table: Tensor, pairs: Pairs, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (integer, any shape) of a table with deltas, ``[*ids.shape, width]``; reads only the rows in use."""
    width = table.shape[1]
    rows, inverse = torch.unique(ids, return_inverse=True)
    slot_of_row = torch.full((table.shape[0],), -1, dtype=torch.int64, device=ids.device)
    # The look-up refuses ids that are out of range, negative ones too: it comes before anything is indexed with them.
    used_rows = F.embedding(rows, table)
    slot_of_row[rows] = torch.arange(rows.numel(), device=ids.device)
    compact = []
    for indices, values in pairs:
        row, column = rows_and_columns(indices, width)
        slots = slot_of_row[row]
        used = (slots >= 0).nonzero().flatten()
        compact.append((slots[used] * width + column[used], values[used]))
    return apply_deltas(used_rows, compact, dtype)[inverse]


def pairs_of(tensors: Sequence[Tensor]) -> Pairs:
    """Indices and values by delta, from a list of all indices followed by all values."""
    half = len(tensors) // 2
    return list(zip(tensors[:half], tensors[half:], strict=True))


def tensors_of(deltas: list[SparseDelta]) -> list[Tensor]:
    """The indices of all deltas, then the values of all deltas; calls the deltas, so that their hooks run."""
    called = [delta() for delta in deltas]
    return [indices for indices, _ in called] + [values for _, values in called]


def _save(ctx: Any, x: Tensor | None, flat: Sequence[Tensor]) -> None:
    """Keep an activation, or None, and `tensors_of` the deltas for the backward pass.

    The indices are not saved as autograd saves tensors: hooks for these, such as those that offload activations, would
    carry them to the CPU and hand out copies, for which nothing that is remembered per index set is known.
    """
    half = len(flat) // 2
    ctx.indices = flat[:half]
    ctx.versions = [_version(indices) for indices in ctx.indices]
    ctx.save_for_backward(x, *flat[half:])


def _saved(ctx: Any) -> tuple[Tensor | None, Pairs]:
    """What `_save` has kept.

    Raises:
        RuntimeError: indices were changed since the forward pass, as autograd raises for the tensors that it saves.
    """
    x, *values = ctx.saved_tensors
    if any(_version(indices) != version for indices, version in zip(ctx.indices, ctx.versions, strict=True)):
        raise RuntimeError(
            "the indices of a delta have been changed between a forward pass and its backward pass: run the backward "
            "pass before the optimizer step that closes a cycle, and before loading an adapter"
        )
    return x, list(zip(ctx.indices, values, strict=True))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # inference tensors have no version


def _flat_gradients(ctx: Any, gradient: WeightGradient | None, pairs: Pairs) -> list[Tensor | None]:
    """What a backward pass returns for its last inputs, `tensors_of` the deltas: indices have no gradient."""
    needed = ctx.needs_input_grad[-len(pairs) :]
    return [None] * len(pairs) + value_gradients(ctx.deltas, gradient, pairs, needed)


class _Adapted(torch.autograd.Function):
    """y = op(x, W + deltas, b)."""

    @staticmethod
    def forward(
        ctx: Any,
        op: WeightOp,
        source: WeightSource,
        state: WeightState,
        deltas: list[SparseDelta],
        x: Tensor,
        weight: Tensor | None,  # here for its gradient alone: the base weight, if it is trained too
        bias: Tensor | None,
        *flat: Tensor,  # `tensors_of` the deltas
    ) -> Tensor:
        half = len(flat) // 2
        trains = any(ctx.needs_input_grad[-half:]) or ctx.needs_input_grad[5]
        ctx.op, ctx.source, ctx.state, ctx.deltas = op, source, state, deltas
        ctx.compute_dtype, ctx.x_shape = x.dtype, x.shape
        pairs = pairs_of(flat)
        out = layer_output(op, source, state, pairs, x, bias)
        # After the product, which has brought x into the caches.
        k = sum(indices.numel() for indices, _ in pairs)
        _save(ctx, op.activation(x, out, k) if trains else None, flat)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, pairs = _saved(ctx)
        op, needs = ctx.op, ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs[4]:
            grad_x = input_gradient(op, ctx.source, ctx.state, pairs, grad_out, ctx.x_shape, ctx.compute_dtype)
        gradient = op.gradient(grad_out, x) if x is not None else None
        with _no_autocast(grad_out):
            if needs[6]:
                grad_bias = op.grad_bias(grad_out)
            if needs[5]:
                grad_weight = gradient.dense()
        return (None, None, None, None, grad_x, grad_weight, grad_bias, *_flat_gradients(ctx, gradient, pairs))


class _FoldedWeight(torch.autograd.Function):
    """W + deltas as a tensor, for layers whose forward pass is their own: their weight gradient is dense."""

    @staticmethod
    def forward(
        ctx: Any, source: WeightSource, state: WeightState, deltas: list[SparseDelta], weight: Tensor, *flat: Tensor
    ) -> Tensor:
        ctx.deltas = deltas
        _save(ctx, None, flat)
        return source.adapted(state, pairs_of(flat))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grads = _flat_gradients(ctx, DenseGradient(grad_out), _saved(ctx)[1])
        return (None, None, None, grad_out if ctx.needs_input_grad[3] else None, *grads)


def adapted_forward(
    op: WeightOp, source: WeightSource, deltas: list[SparseDelta], x: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The output of a layer whose weight has deltas added, recorded by autograd.

    Gradients flow to x, the bias, the deltas' values and, if it requires one, the base weight.

    Args:
        op: what the layer computes with its weight.
        source: how the weight is read.
        deltas: to add.
        x: ``[..., in]`` in the compute dtype; integer ids for an embedding.
        bias: ``[out]`` of any dtype, cast to the compute dtype; None for an embedding.
    """
    forward = _adapted_outside_graph if torch.compiler.is_compiling() else _adapted_forward
    return forward(op, source, deltas, x, bias)


def _adapted_forward(
    op: WeightOp, source: WeightSource, deltas: list[SparseDelta], x: Tensor, bias: Tensor | None
) -> Tensor:
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    expect_gradients(op, deltas, x)
    state = source.state(x.dtype)
    weight = state.parameter if state.parameter is not None and state.parameter.requires_grad else None
    return _Adapted.apply(op, source, state, deltas, x, weight, bias, *tensors_of(deltas))


def folded_weight(source: WeightSource, deltas: list[SparseDelta], state: WeightState | None = None) -> Tensor:
    """The adapted weight as a tensor that passes its (dense) gradient on to the deltas.

    Args:
        source: how the weight is read.
        deltas: to add.
        state: of the weight in this pass; noted now if None.
    """
    fold = _folded_outside_graph if torch.compiler.is_compiling() else _folded_weight
    return fold(source, deltas, state)


def _folded_weight(source: WeightSource, deltas: list[SparseDelta], state: WeightState | None) -> Tensor:
    state = state or source.state()
    return _FoldedWeight.apply(source, state, deltas, state.parameter, *tensors_of(deltas))


# Autograd functions that hold modules cannot be traced by torch.compile, which runs these as they are. Asking whether
# it is at work costs eager calls less than keeping it out.
_adapted_outside_graph = torch.compiler.disable(_adapted_forward)
_folded_outside_graph = torch.compiler.disable(_folded_weight)
