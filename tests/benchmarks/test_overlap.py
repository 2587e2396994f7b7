"""The benchmark `overlap`, which compares the candidates of several ranks with the exact ones."""

from __future__ import annotations

import pytest
import torch
from benchmarks_under_test import overlap
from torch import Tensor

RANKS, STEPS, SIZE, K = 3, 6, 2000, 100


def gradients(noise: float) -> list[list[Tensor]]:
    """Gradients by step and rank: a common part, and noise that differs between ranks."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(SIZE, generator=generator)
    return [[common + noise * torch.randn(SIZE, generator=generator) for _ in range(RANKS)] for _ in range(STEPS)]


def test_ranks_with_equal_gradients_find_the_exact_candidates() -> None:
    for values in overlap.compare(gradients(0.0), K).values():
        assert values["overlap"] == 1.0
        # Sums in float32, in another order of the positions.
        assert values["share_of_window"] == pytest.approx(1.0, abs=1e-5)


def test_together_is_better_than_alone() -> None:
    found = overlap.compare(gradients(0.7), K)
    assert found["exact"]["overlap"] == 1.0
    for name in ("together", "first_window"):
        assert found["alone"]["overlap"] < found[name]["overlap"] < 1.0
        assert found["alone"]["share_of_window"] < found[name]["share_of_window"] < 1.0


def test_means_over_modules_and_windows() -> None:
    flat = [gradient for step in gradients(0.7) for gradient in step]
    result = overlap.measure({"a": flat, "b": flat + flat}, RANKS, K / SIZE)
    assert (result["ranks"], result["samples"]) == (RANKS, 3)
    assert 1.0 < result["union_over_k"] < RANKS
    for name, values in overlap.compare(gradients(0.7), K).items():
        assert result[name]["overlap"] == pytest.approx(values["overlap"])
