"""The gradient of a weight in one backward pass, computed only where somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from spiel_kernels import (
    gather_conv_sets,
    gather_dense,
    gather_embedding_sets,
    gather_outer_sets,
    topk_conv,
    topk_dense,
    topk_embedding,
    topk_outer,
)
from spiel_kernels.gather import ConvGeometry


class WeightGradient(Protocol):
    """The gradient of a weight in one backward pass, computed only where somebody asks."""

    def gather_sets(self, index_sets: Sequence[Tensor]) -> list[Tensor]:
        """Gradient ``[k]`` at sorted flat positions ``[k]``, float32 or float64, for each set of them."""

    def topk(self, k: int) -> Tensor:
        """Ascending int64 positions of the (at most) k largest absolute entries that are not zero."""


class OuterGradient:
    """Weight gradient ``a.T @ b`` of a linear layer; a ``[N, rows]``, b ``[N, cols]``."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b

    def gather_sets(self, index_sets: Sequence[Tensor]) -> list[Tensor]:
        return gather_outer_sets(self.a, self.b, index_sets)

    def topk(self, k: int) -> Tensor:
        return topk_outer(self.a, self.b, k)

    def dense(self) -> Tensor:
        return self.a.T @ self.b


class ConvGradient:
    """Weight gradient of a convolution."""

    def __init__(self, grad_out: Tensor, x: Tensor, geometry: ConvGeometry) -> None:
        self.grad_out, self.x, self.geometry = grad_out, x, geometry

    def gather_sets(self, index_sets: Sequence[Tensor]) -> list[Tensor]:
        return gather_conv_sets(self.grad_out, self.x, self.geometry, index_sets)

    def topk(self, k: int) -> Tensor:
        return topk_conv(self.grad_out, self.x, self.geometry, k)

    def dense(self) -> Tensor:
        every = torch.arange(self.geometry.rows * self.geometry.cols, device=self.x.device)
        return self.gather_sets([every])[0].view(self.geometry.weight_shape)


class EmbeddingGradient:
    """Weight gradient of an embedding."""

    def __init__(self, grad_out: Tensor, ids: Tensor, padding_idx: int | None, by_frequency: bool) -> None:
        self.args = (padding_idx, by_frequency)
        self.grad_out, self.ids = grad_out, ids

    def gather_sets(self, index_sets: Sequence[Tensor]) -> list[Tensor]:
        return gather_embedding_sets(self.grad_out, self.ids, index_sets, *self.args)

    def topk(self, k: int) -> Tensor:
        return topk_embedding(self.grad_out, self.ids, *self.args, k)


class DenseGradient:
    """A gradient that autograd has formed already."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def gather_sets(self, index_sets: Sequence[Tensor]) -> list[Tensor]:
        return [gather_dense(self.gradient, indices) for indices in index_sets]

    def topk(self, k: int) -> Tensor:
        return topk_dense(self.gradient, k)
