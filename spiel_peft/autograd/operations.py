"""What each kind of layer computes with its weight: its output, its input gradient and its weight gradient.

A weight gradient is an object that computes the entries at given positions, or the positions of its largest entries,
and never the whole matrix unless it is asked for (`spiel_peft.delta.WeightGradient`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spiel_kernels import (
    Largest,
    gather_conv_sets,
    gather_dense,
    gather_embedding_sets,
    gather_outer_sets,
    largest_outer,
    topk_conv,
    topk_dense,
    topk_embedding,
)
from spiel_kernels.dispatch import runs_triton
from spiel_kernels.gather import ConvGeometry
from spiel_kernels.sampled import sampled_pays, turned


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

    def activation(self, x: Tensor, out: Tensor, k: int) -> Tensor:
        """The form of the input that is kept for `gradient`: the input itself, or a copy that lies column by column.

        Args:
            x, out: input ``[..., in]`` and output ``[..., out]`` of the layer.
            k: number of entries of the weight gradient that will be gathered.
        """
        if x.device.type != "cpu" or runs_triton(x) or not sampled_pays(out.shape[-1], x.shape[-1], k):
            return x
        # A copy of a view would be extra memory where the tensor that it is a view of is kept anyway (by attention).
        return x if x._is_view() else turned(x)

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

    def activation(self, x: Tensor, out: Tensor, k: int) -> Tensor:
        return x

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


class EmbeddingOp:
    """A look-up of integer ids of any shape in a table ``[rows, width]``; there is no input gradient and no bias.

    Args:
        rows: of the table.
        padding_idx: row that gets no gradient, or None.
        by_frequency: divide the gradient of a row by how often it occurs in the ids (``scale_grad_by_freq``).
    """

    def __init__(self, rows: int, padding_idx: int | None, by_frequency: bool) -> None:
        self.rows, self.padding_idx, self.by_frequency = rows, padding_idx, by_frequency

    def activation(self, ids: Tensor, out: Tensor, k: int) -> Tensor:
        return ids

    def gradient(self, grad_out: Tensor, ids: Tensor) -> EmbeddingGradient:
        return EmbeddingGradient(grad_out, ids, self)


WeightOp = LinearOp | ConvOp | EmbeddingOp


class OuterGradient:
    """Weight gradient ``a.T @ b`` of a linear layer; a ``[N, rows]``, b ``[N, cols]``."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b

    def gather_sets(self, index_sets: Sequence[Tensor]) -> list[Tensor]:
        return gather_outer_sets(self.a, self.b, index_sets, "ready")

    def largest(self, k: int, wait: bool) -> Largest:
        return largest_outer(self.a, self.b, k, wait)

    def dense(self) -> Tensor:
        return self.a.T @ self.b


class ConvGradient:
    """Weight gradient of a convolution."""

    def __init__(self, grad_out: Tensor, x: Tensor, geometry: ConvGeometry) -> None:
        self.grad_out, self.x, self.geometry = grad_out, x, geometry

    def gather_sets(self, index_sets: Sequence[Tensor]) -> list[Tensor]:
        return gather_conv_sets(self.grad_out, self.x, self.geometry, index_sets)

    def largest(self, k: int, wait: bool) -> Largest:
        return Largest(topk_conv(self.grad_out, self.x, self.geometry, k))

    def dense(self) -> Tensor:
        every = torch.arange(self.geometry.rows * self.geometry.cols, device=self.x.device)
        return self.gather_sets([every])[0].view(self.geometry.weight_shape)


class EmbeddingGradient:
    """Weight gradient of an embedding."""

    def __init__(self, grad_out: Tensor, ids: Tensor, op: EmbeddingOp) -> None:
        self.grad_out, self.ids, self.op = grad_out, ids, op

    def gather_sets(self, index_sets: Sequence[Tensor]) -> list[Tensor]:
        return gather_embedding_sets(self.grad_out, self.ids, index_sets, self.op.padding_idx, self.op.by_frequency)

    def largest(self, k: int, wait: bool) -> Largest:
        return Largest(topk_embedding(self.grad_out, self.ids, self.op.padding_idx, self.op.by_frequency, k))

    def dense(self) -> Tensor:
        padding = -1 if self.op.padding_idx is None else self.op.padding_idx
        return torch.ops.aten.embedding_dense_backward(
            self.grad_out, self.ids, self.op.rows, padding, self.op.by_frequency
        )


class DenseGradient:
    """A weight gradient that autograd has formed already, as a dense tensor of the weight's shape."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def gather_sets(self, index_sets: Sequence[Tensor]) -> list[Tensor]:
        return [gather_dense(self.gradient, indices) for indices in index_sets]

    def largest(self, k: int, wait: bool) -> Largest:
        return Largest(topk_dense(self.gradient, k))
