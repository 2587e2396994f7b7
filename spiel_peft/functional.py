"""Forward and backward through an adapted weight: only what needs a gradient gets one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spiel_kernels import apply_deltas
from spiel_kernels.gather import ConvGeometry

from .delta import SparseDelta
from .resident import Pairs, WeightFold, can_fold
from .weight_gradients import ConvGradient, DenseGradient, EmbeddingGradient, OuterGradient, WeightGradient


class LinearOp:
    """``x @ W.T + b`` for a weight ``[out, in]``, or ``x @ W + b`` for a transposed one ``[in, out]``."""

    def __init__(self, transposed: bool) -> None:
        self.transposed = transposed

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.transposed:
            return F.linear(x, weight, bias)
        # The very operation of transformers' Conv1D, so that a merged layer gives the same bits.
        shape = (*x.shape[:-1], weight.shape[1])
        flat = x.reshape(-1, x.shape[-1])
        return (torch.addmm(bias, flat, weight) if bias is not None else flat @ weight).view(shape)

    def grad_input(self, grad_out: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:
        return grad_out @ (weight.T if self.transposed else weight)

    def gradient(self, grad_out: Tensor, x: Tensor) -> OuterGradient:
        grad_out = grad_out.reshape(-1, grad_out.shape[-1])
        x = x.reshape(-1, x.shape[-1])
        return OuterGradient(x, grad_out) if self.transposed else OuterGradient(grad_out, x)

    def grad_bias(self, grad_out: Tensor) -> Tensor:
        return grad_out.reshape(-1, grad_out.shape[-1]).sum(0)


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvOp:
    """A convolution over a batched input ``[batch, in, *spatial]`` with numeric zero padding."""

    def __init__(self, geometry: ConvGeometry) -> None:
        self.geometry = geometry

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        g = self.geometry
        return _CONVOLUTIONS[len(g.stride)](x, weight, bias, g.stride, g.padding, g.dilation, g.groups)

    def grad_input(self, grad_out: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:
        g = self.geometry
        if x_shape[0] == 0:
            return grad_out.new_zeros(x_shape)
        return torch.ops.aten.convolution_backward(
            grad_out,
            grad_out.new_empty(1).expand(x_shape),
            weight,
            None,
            g.stride,
            g.padding,
            g.dilation,
            False,
            [0] * len(g.stride),
            g.groups,
            [True, False, False],
        )[0]

    def gradient(self, grad_out: Tensor, x: Tensor) -> ConvGradient:
        return ConvGradient(grad_out, x, self.geometry)

    def grad_bias(self, grad_out: Tensor) -> Tensor:
        return grad_out.transpose(0, 1).flatten(1).sum(1)


WEIGHT_CHANGED = (
    "a base weight was changed (merged, unmerged or written to) between a forward pass and its backward pass; finish "
    "the backward pass first"
)


class WeightSource:
    """Reads a base weight now and again in backward, and notices if it changed in between.

    Args:
        read: returns the weight, plain or dequantized; raises if it has been merged in the meantime.
        parameter: the plain parameter behind it, or None for a weight that is quantized or offloaded.
        dtype: dtype to which the adapted weight is rounded.
        fold: writes deltas into the parameter.
        stays: deltas may stay in the parameter after an operation that records a gradient.
        in_workspace: for a quantized weight: dequantizes it with deltas added into memory that all layers share, valid
            until the next call; gives None where it cannot.
    """

    def __init__(
        self,
        read: Callable[[], Tensor],
        parameter: Tensor | None,
        dtype: torch.dtype,
        fold: WeightFold | None = None,
        stays: bool = False,
        in_workspace: Callable[[Pairs, torch.dtype], Tensor | None] | None = None,
    ) -> None:
        self.read = read
        self.parameter = parameter
        self.dtype = dtype
        self.fold = fold
        self.stays = stays
        self.in_workspace = in_workspace
        self.version = self._current_version()

    def _current_version(self) -> int:
        # Inference tensors have no version, and no backward pass either.
        tracked = self.parameter is not None and not self.parameter.is_inference()
        return self.parameter._version if tracked else 0

    def _read_unchanged(self) -> Tensor:
        if self._current_version() != self.version:
            raise RuntimeError(WEIGHT_CHANGED)
        return self.read()

    def adapted(self, pairs: Pairs) -> Tensor:
        """The adapted weight as a tensor of its own."""
        if self.fold is not None:
            self.fold.unfold()
        return apply_deltas(self._read_unchanged(), pairs, self.dtype)

    @contextmanager
    def weight(
        self, deltas: Sequence[SparseDelta], pairs: Pairs, compute_dtype: torch.dtype, in_backward: bool = False
    ) -> Iterator[Tensor]:
        """The adapted weight for the length of one operation: in place where that can be done, else a copy.

        The operation must not keep the tensor.
        """
        if self.in_workspace is not None:
            weight = self.in_workspace(pairs, compute_dtype)
            if weight is not None:
                yield weight
                return
        weight = self._read_unchanged()
        if self.fold is None or self.parameter is None or not can_fold(self.parameter):
            yield apply_deltas(weight, pairs, self.dtype).to(compute_dtype)
        elif self.stays:
            self.fold.fold(self.parameter, deltas, pairs, as_in_forward=in_backward)
            yield self.parameter.data.to(compute_dtype)
        else:
            with self.fold.transient(self.parameter, deltas, pairs) as folded:
                yield folded.to(compute_dtype)


def no_autocast(x: Tensor) -> torch.autocast:
    """What is computed inside runs in the dtype of its operands."""
    return torch.autocast(x.device.type, enabled=False)


def gather_delta_gradients(
    deltas: Sequence[SparseDelta], gradient: WeightGradient | None, pairs: Pairs, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradient of each delta's values, None where it is not needed.

    Collectors say first at which other positions they want the weight gradient: all are gathered in one go.
    """
    asked = [(delta, *pair) for delta, pair, need in zip(deltas, pairs, needed, strict=True) if need]
    if not asked:
        return [None] * len(pairs)
    extra = [delta.collector.wanted(delta, gradient) if delta.collector is not None else None for delta, _, _ in asked]
    sets = [indices for _, indices, _ in asked] + [positions for positions in extra if positions is not None]
    gathered = iter(gradient.gather_sets(sets))
    active = [next(gathered) for _ in asked]
    for (delta, _, _), own, positions in zip(asked, active, extra, strict=True):
        if delta.collector is not None:
            delta.collector.collect(delta, own, next(gathered) if positions is not None else None)
    grads = iter(own.to(values.dtype) for own, (_, _, values) in zip(active, asked, strict=True))
    return [next(grads) if need else None for need in needed]


def _delta_gradients(ctx: Any, gradient: WeightGradient | None, pairs: Pairs) -> list[Tensor | None]:
    """What a backward pass returns for `flat`, its last inputs: nothing for indices, gradients for values."""
    needed = ctx.needs_input_grad[-len(pairs) :]
    return [None] * len(pairs) + gather_delta_gradients(ctx.deltas, gradient, pairs, needed)


def _pairs(tensors: Sequence[Tensor]) -> Pairs:
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
        # weight is here for its gradient alone, should somebody train it too; flat: all indices, then all values
        half = len(flat) // 2
        trains = any(ctx.needs_input_grad[6 + half :]) or ctx.needs_input_grad[4]
        ctx.op, ctx.source, ctx.deltas = op, source, deltas
        ctx.compute_dtype, ctx.x_shape = x.dtype, x.shape
        ctx.save_for_backward(x if trains else None, *flat)
        with no_autocast(x):
            with source.weight(deltas, _pairs(flat), x.dtype) as weight:
                return op.forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, *flat = ctx.saved_tensors
        pairs = _pairs(flat)
        needs = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        with no_autocast(grad_out):
            if needs[3]:
                with ctx.source.weight(ctx.deltas, pairs, ctx.compute_dtype, in_backward=True) as weight:
                    grad_x = ctx.op.grad_input(grad_out, weight, ctx.x_shape)
            if needs[5]:
                grad_bias = ctx.op.grad_bias(grad_out)
            gradient = ctx.op.gradient(grad_out, x) if x is not None else None
            if needs[4]:
                grad_weight = gradient.dense()
            grads = _delta_gradients(ctx, gradient, pairs)
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
        full = source.read()
        ctx.deltas, ctx.args, ctx.weight_shape = deltas, (padding_idx, by_frequency), full.shape
        ctx.save_for_backward(ids, *flat)
        return look_up(full, _pairs(flat), ids, source.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        ids, *flat = ctx.saved_tensors
        pairs = _pairs(flat)
        needs = ctx.needs_input_grad
        gradient = EmbeddingGradient(grad_out, ids, *ctx.args)
        grad_weight = None
        if needs[3]:
            grad_weight = torch.ops.aten.embedding_dense_backward(
                grad_out, ids, ctx.weight_shape[0], -1 if ctx.args[0] is None else ctx.args[0], ctx.args[1]
            )
        grads = _delta_gradients(ctx, gradient, pairs)
        return (None, None, None, grad_weight, None, None, *grads)


class _FoldedWeight(torch.autograd.Function):
    """W + deltas as a tensor, for layers whose forward pass is their own: their weight gradient is dense."""

    @staticmethod
    def forward(ctx: Any, source: WeightSource, deltas: list[SparseDelta], weight: Tensor, *flat: Tensor) -> Tensor:
        ctx.deltas = deltas
        ctx.save_for_backward(*flat)
        return source.adapted(_pairs(flat))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        pairs = _pairs(ctx.saved_tensors)
        needs = ctx.needs_input_grad
        gradient = DenseGradient(grad_out)
        grads = _delta_gradients(ctx, gradient, pairs)
        return (None, None, grad_out if needs[2] else None, *grads)


def _tensors(deltas: list[SparseDelta]) -> list[Tensor]:
    called = [delta() for delta in deltas]
    return [indices for indices, _ in called] + [values for _, values in called]


# The autograd functions hold modules and callables, which torch.compile cannot trace: it runs them as they are.


@torch.compiler.disable
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
    bias = bias.to(x.dtype) if bias is not None else None
    weight = source.parameter if source.parameter is not None and source.parameter.requires_grad else None
    return _Adapted.apply(op, source, deltas, x, weight, bias, *_tensors(deltas))


@torch.compiler.disable
def adapted_embedding(
    source: WeightSource,
    deltas: list[SparseDelta],
    ids: Tensor,
    padding_idx: int | None,
    by_frequency: bool,
) -> Tensor:
    """Look `ids` (integer, any shape) up in the adapted table; returns ``[*ids.shape, width]``."""
    return _AdaptedEmbedding.apply(source, deltas, ids, source.parameter, padding_idx, by_frequency, *_tensors(deltas))


@torch.compiler.disable
def folded_weight(source: WeightSource, deltas: list[SparseDelta]) -> Tensor:
    """The adapted weight as a tensor that passes its (dense) gradient on to the deltas."""
    return _FoldedWeight.apply(source, deltas, source.parameter, *_tensors(deltas))
