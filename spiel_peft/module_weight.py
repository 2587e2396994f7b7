"""Adapted weights for modules that compute with them in their own way: autograd forms their dense gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .delta import SparseDelta
from .functional import delta_gradients, pairs_of, tensors_of
from .weight_gradients import DenseGradient
from .weight_source import WeightSource


class _AliasedWeight(torch.autograd.Function):
    """The base weight's own memory, with the deltas folded into it: what `_FoldedWeight` gives, without the copy."""

    @staticmethod
    def forward(ctx: Any, source: WeightSource, deltas: list[SparseDelta], *flat: Tensor) -> Tensor:
        ctx.source, ctx.deltas = source, deltas
        ctx.save_for_backward(*flat)
        with source.weight(deltas, pairs_of(flat), source.dtype) as weight:
            return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        held = ctx.source.fold.deltas
        if len(held) != len(ctx.deltas) or any(a is not b for a, b in zip(held, ctx.deltas, strict=True)):
            raise RuntimeError(
                f"{ctx.deltas[0].module_name}: the deltas were taken out of the weight (by an evaluation, a state dict "
                "or another adapter) before the backward pass of a tensor that left its module otherwise than as an "
                "output; finish the backward pass first"
            )
        return (None, None, *delta_gradients(ctx, DenseGradient(grad_out), pairs_of(ctx.saved_tensors)))


class _Refolding(torch.autograd.Function):
    """Identity; its backward pass, which runs before that of what made the tensor, folds as the forward pass did."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, source: WeightSource, deltas: list[SparseDelta], *flat: Tensor) -> Tensor:
        ctx.source, ctx.deltas = source, deltas
        ctx.save_for_backward(*flat)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        flat = ctx.saved_tensors
        with ctx.source.weight(ctx.deltas, pairs_of(flat), ctx.source.dtype, in_backward=True):
            return (grad_out, None, None, *[None] * len(flat))


@torch.compiler.disable
def aliased_weight(source: WeightSource, deltas: list[SparseDelta]) -> Tensor:
    """The adapted weight in the base weight's memory, for a source whose deltas may stay there.

    Operations may keep it for their backward pass if their results go through `refolding`.
    """
    return _AliasedWeight.apply(source, deltas, *tensors_of(deltas))


@torch.compiler.disable
def refolding(out: Any, source: WeightSource, deltas: list[SparseDelta]) -> Any:
    """`out` itself; if it is a tensor with a gradient, the deltas are in the weight again before its backward pass."""
    if not isinstance(out, Tensor) or not out.requires_grad:
        return out
    flat = [tensor.detach() for tensor in tensors_of(deltas)]
    return _Refolding.apply(out, source, deltas, *flat)


@contextmanager
def weight_in_place(source: WeightSource, deltas: list[SparseDelta]) -> Iterator[Tensor]:
    """The adapted weight for the length of a pass without gradients, in the base weight's memory if it can be."""
    flat = [tensor.detach() for tensor in tensors_of(deltas)]
    with source.weight(deltas, pairs_of(flat), source.dtype) as weight:
        yield weight
