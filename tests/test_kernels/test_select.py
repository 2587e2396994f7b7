"""Selection of the largest scores: exact, and the lowest position wins a tie."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tensors import OpRecorder

from spiel_kernels import (
    StreamingTopK,
    select,
    stable_topk,
    streaming,
    topk_conv,
    topk_dense,
    topk_embedding,
    topk_outer,
)
from spiel_kernels.gather import ConvGeometry

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


def test_best_mask() -> None:
    scores = torch.tensor([0.0, 2.0, 1.0, 3.0, 1.0, 0.0, 1.0])
    for k, expected in ((1, [3]), (4, [1, 2, 3, 4]), (5, [1, 2, 3, 4, 6]), (6, [0, 1, 2, 3, 4, 6]), (7, [*range(7)])):
        assert streaming.best_mask(scores, k).nonzero().flatten().tolist() == expected


@property_test
@given(SCORES, st.integers(0, 45), st.lists(st.integers(0, 9), max_size=12), st.sampled_from(FLOATS))
def test_streaming_equals_one_sort(scores: list[float], k: int, cuts: list[int], dtype: torch.dtype) -> None:
    """However the scores are cut into blocks, empty ones included."""
    top = StreamingTopK(k)
    start = 0
    for length in [*cuts, len(scores)]:
        block = torch.tensor(scores[start : start + length], dtype=dtype)
        top.update(block, start)
        start += block.numel()
    assert top.result().tolist() == top_positions(scores, k)


@settings(deadline=None, max_examples=300)
@given(
    st.integers(1, 400),
    st.integers(0, 300),
    st.integers(1, 130),
    st.sampled_from([2.5, 0.0, -3.0]),
    st.sampled_from(["spread", "rising", "falling", "ties", "mostly zero", "nan", "infinite"]),
    st.sampled_from(FLOATS),
    st.integers(0, 2**20),
)
def test_streaming_of_many_blocks(
    size: int, k: int, block: int, margin: float, kind: str, dtype: torch.dtype, seed: int
) -> None:
    """Samples too small to be reliable: guessed thresholds are too high or too low, and many scores tie with them."""
    noise = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    scores = {
        "spread": lambda: (noise * 20).exp(),
        "rising": lambda: noise + torch.arange(size),
        "falling": lambda: noise + torch.arange(size, 0, -1),
        "ties": lambda: (noise * 3).round(),
        "mostly zero": lambda: (noise - 0.8).relu(),
        "nan": lambda: torch.where(noise < 0.3, math.nan, noise),
        "infinite": lambda: torch.where(noise < 0.3, math.inf, noise),
    }[kind]()
    scores = scores.clamp(max=6e4 if dtype == torch.float16 else math.inf).to(dtype)
    with patch.multiple(streaming, _SAMPLE=16, _SAMPLE_REACHED=2, _MARGIN=margin):
        top = StreamingTopK(k)
        for number, part in enumerate(scores.split(block)):
            top.update(part, number * block)
    assert top.result().tolist() == top_positions(scores.double().nan_to_num(nan=0.0, posinf=math.inf).tolist(), k)


@pytest.mark.parametrize("order", ["random", "rising", "equal"])
def test_streaming_holds_few_scores(order: str) -> None:
    """At most 3 k scores and those of a block are held, whatever their order."""
    scores = {
        "random": lambda: torch.rand(200_000),
        "rising": lambda: torch.arange(1, 200_001).float(),
        "equal": lambda: torch.ones(200_000),
    }[order]()
    k, block = 500, 4000
    with OpRecorder() as recorder:
        top = StreamingTopK(k)
        for number, part in enumerate(scores.split(block)):
            top.update(part, number * block)
        got = top.result()
    assert recorder.largest <= 3 * k + block
    assert got.tolist() == top_positions(scores.tolist(), k)


@property_test
@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, math.nan, math.inf, -math.inf]), max_size=70),
    st.sampled_from([-math.inf, 0.0, 1.0, 2.0]),
    st.sampled_from(FLOATS),
)
def test_few_above(scores: list[float], bound: float, dtype: torch.dtype) -> None:
    expected = [slot for slot, score in enumerate(scores) if score > bound]
    found = streaming.few_above(torch.tensor(scores, dtype=dtype), bound)
    if found is None:
        assert 3 * 8 * len([s for s in scores if not s <= bound]) > len(scores) - 24
    else:
        assert found.tolist() == expected


@pytest.mark.parametrize("size", [1, 7, 8, 63, 5000])
def test_few_above_finds_a_single_score_anywhere(size: int) -> None:
    for slot in {0, 1, size // 3, size // 2, size - 2, size - 1} & set(range(size)):
        for others in (0.0, math.nan):
            scores = torch.full((size,), 0.0)
            scores[:1] = others
            scores[slot] = 2.0
            found = streaming.few_above(scores, 1.0)
            assert found is None or found.tolist() == [slot]
            assert found is not None or size < 64


@pytest.mark.parametrize("k", [1, 40, 5000, 9000])
@pytest.mark.parametrize("width", [1, 64, 100])
def test_sampled_threshold_is_near(k: int, width: int) -> None:
    """At least k scores and not many more reach it, also if the columns of a matrix differ in size."""
    scores = torch.rand(10_000) * (1 + torch.arange(10_000) % width)
    pieces = [scores[:1000], scores[1000:1001], scores[1001:]]
    reached = int((scores >= streaming.sampled_threshold(pieces, k)).sum())
    assert k <= reached <= 1.4 * k + 30


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


GEOMETRY = ConvGeometry((4, 3, 2), stride=(1,), padding=(0,), dilation=(1,), groups=1)
SELECTIONS = {
    "stable_topk": lambda k: stable_topk(torch.rand(5), k),
    "topk_outer": lambda k: topk_outer(torch.rand(2, 3), torch.rand(2, 4), k),
    "topk_conv": lambda k: topk_conv(torch.rand(1, 4, 5), torch.rand(1, 3, 6), GEOMETRY, k),
    "topk_embedding": lambda k: topk_embedding(torch.rand(3, 4), torch.tensor([0, 1, 1]), None, False, k),
    "topk_dense": lambda k: topk_dense(torch.rand(3, 4), k),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_negative_count_is_refused(name: str) -> None:
    assert SELECTIONS[name](2).numel() == 2
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        SELECTIONS[name](-1)


@pytest.mark.parametrize(
    "a, b",
    [(torch.rand(2, 3), torch.rand(3, 3)), (torch.rand(3), torch.rand(3)), (torch.rand(1, 2, 3), torch.rand(1, 2))],
    ids=["rows", "vectors", "dimensions"],
)
def test_operands_that_do_not_match_are_refused(a: torch.Tensor, b: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"a and b must be \[N, rows\] and \[N, cols\], got"):
        topk_outer(a, b, 1)


def test_gradients_and_operands_are_left_as_they_are() -> None:
    """Also while autograd records."""
    gradient = torch.randn(6, 5, requires_grad=True)
    a, b = torch.randn(4, 6, requires_grad=True), torch.randn(4, 5)
    before = [tensor.detach().clone() for tensor in (gradient, a, b)]
    assert not topk_dense(gradient, 3).requires_grad and not topk_outer(a, b, 3).requires_grad
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((gradient, a, b), before, strict=True))


def test_dense_gradient_in_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_DENSE_BLOCK", 7)
    gradient = torch.randint(-3, 4, (9, 11)).float()
    expected = top_positions(gradient.abs().flatten().tolist(), 20)
    assert topk_dense(gradient, 20).tolist() == expected
    assert topk_dense(gradient.T.contiguous().T, 20).tolist() == expected


def test_registered_operations() -> None:
    ops = torch.ops.spiel_kernels
    torch.library.opcheck(ops.stable_topk, (torch.rand(9), 4))
    torch.library.opcheck(ops.topk_outer, (torch.randn(4, 6), torch.randn(4, 5), 7))
    torch.library.opcheck(ops.topk_dense, (torch.randn(6, 5), 7))
    torch.library.opcheck(ops.topk_embedding, (torch.randn(3, 4), torch.tensor([0, 2, 2]), None, False, 5))


def test_compiled_without_graph_breaks() -> None:
    def choose(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return topk_outer(a, b, 5) + topk_dense(a.T @ b, 5)

    arguments = torch.randn(4, 6), torch.randn(4, 5)
    assert torch.equal(torch.compile(choose, fullgraph=True, backend="aot_eager")(*arguments), choose(*arguments))
