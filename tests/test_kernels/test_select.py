"""`stable_topk` and `StreamingTopK`: exact, and the lowest position wins a tie."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spiel_kernels import StreamingTopK, stable_topk

from .oracle import property_test, top_positions

# Few distinct values, so that ties are the rule.
SCORES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, math.inf]), max_size=40)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@property_test
@given(SCORES, st.integers(0, 45), st.sampled_from(FLOATS))
def test_stable_topk(scores: list[float], k: int, dtype: torch.dtype) -> None:
    by_rank = sorted(range(len(scores)), key=lambda slot: (-scores[slot], slot))
    got = stable_topk(torch.tensor(scores, dtype=dtype), k)
    assert got.dtype == torch.int64
    assert got.tolist() == sorted(by_rank[:k])


@property_test
@given(SCORES, st.integers(0, 45), st.lists(st.integers(0, 9), max_size=12), st.sampled_from(FLOATS))
def test_streaming_equals_one_sort(scores: list[float], k: int, cuts: list[int], dtype: torch.dtype) -> None:
    """However the scores are cut into blocks, empty ones included."""
    top = StreamingTopK(k)
    start = 0
    for length in [*cuts, len(scores)]:
        block = torch.tensor(scores[start : start + length], dtype=dtype)
        top.update(block, start)
        assert top.scores is not None and top.scores.numel() <= k
        start += block.numel()
    assert top.result().tolist() == top_positions(scores, k)


@property_test
@given(SCORES, st.integers(0, 20))
def test_streaming_with_explicit_positions(scores: list[float], k: int) -> None:
    top = StreamingTopK(k)
    positions = torch.arange(len(scores)) * 3 + 5
    half = len(scores) // 2
    top.update(torch.tensor(scores[:half]), positions[:half])
    top.update(torch.tensor(scores[half:]), positions[half:])
    assert top.result().tolist() == [3 * p + 5 for p in top_positions(scores, k)]


def test_nothing_offered() -> None:
    result = StreamingTopK(4).result()
    assert result.dtype == torch.int64 and result.numel() == 0


def test_nan_is_never_chosen() -> None:
    top = StreamingTopK(3)
    top.update(torch.tensor([math.nan, 1.0, math.nan]), 0)
    top.update(torch.tensor([math.nan, 2.0]), 3)
    assert top.result().tolist() == [1, 4]


@pytest.mark.parametrize("floor, expected", [(0.0, [2]), (-1.5, [1, 2]), (-math.inf, [0, 1, 2])])
def test_floor_is_exclusive(floor: float, expected: list[int]) -> None:
    top = StreamingTopK(3, floor=floor)
    top.update(torch.tensor([-1.5, 0.0, 1.0]), 0)
    assert top.result().tolist() == expected


def test_a_later_tie_never_displaces_an_earlier_position() -> None:
    top = StreamingTopK(2)
    for start in range(0, 8, 2):
        top.update(torch.ones(2), start)
    assert top.result().tolist() == [0, 1]
