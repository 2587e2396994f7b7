"""Operators for embedding tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..delta import SparseDelta
from ..functional import gather_delta_gradients, look_up
from ..weight_gradients import EmbeddingGradient
from .registry import NAMESPACE, define, detached_pairs, find_layer, implement, library, owners_of

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
    """`spiel_peft.functional.adapted_embedding` for graphs of torch.compile; arguments as in `adapted_operator`."""
    indices, values = [d.indices for d in deltas], [d.values for d in deltas]
    padding = -1 if padding_idx is None else padding_idx
    return torch.ops.spiel_peft.embedding(ids, weight, indices, values, number, padding, by_frequency)
