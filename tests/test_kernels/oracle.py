"""Slow, plain counterparts of the kernels, in float64 and with loops, and random operands for the tests."""

from __future__ import annotations

import torch
from hypothesis import settings
from torch import Tensor

property_test = settings(deadline=None, max_examples=60)

# Kernels accumulate in float32, or in float64 as soon as an operand has it.
DTYPES = [
    (torch.float64, 1e-13),
    (torch.float32, 1e-5),
    (torch.bfloat16, 1e-5),
    (torch.float16, 1e-5),
]
DTYPE_IDS = ["f64", "f32", "bf16", "f16"]


def draw_indices(numel: int, k: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """k random positions of a weight with `numel` entries, sorted and unique."""
    return torch.randperm(numel)[:k].sort().values.to(dtype)


def draw_deltas(numel: int, *counts: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Random int32 positions and values of a delta for each count."""
    return [(draw_indices(numel, k, torch.int32), torch.randn(k).to(dtype)) for k in counts]


def small_integers(*shape: int) -> Tensor:
    """Random integers from -2 to 2 in float32: their products are exact in every dtype and tie often."""
    return torch.randint(-2, 3, shape).float()


def outer_entries(a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
    """Entries of ``a.T @ b`` in float64, computed by the definition."""
    a, b = a.double(), b.double()
    out = torch.zeros(indices.numel(), dtype=torch.float64)
    for slot, position in enumerate(indices.tolist()):
        row, col = divmod(position, b.shape[1])
        for n in range(a.shape[0]):
            out[slot] += a[n, row] * b[n, col]
    return out


def top_positions(scores: list[float], k: int) -> list[int]:
    """Positions of the k largest positive scores, ascending; equal scores: the lower position."""
    candidates = [(-score, position) for position, score in enumerate(scores) if score > 0]
    return sorted(position for _, position in sorted(candidates)[:k])


def adapted_weight(weight: Tensor, deltas: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Weight plus deltas in float64, entry by entry."""
    flat = weight.double().flatten().tolist()
    for indices, values in deltas:
        for position, value in zip(indices.tolist(), values.double().tolist(), strict=True):
            flat[position] += value
    return torch.tensor(flat, dtype=torch.float64).view(weight.shape)
