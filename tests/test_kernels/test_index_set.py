"""Index sets are drawn, checked and edited: properties over random small cases."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spiel_kernels import check_index_set, index_dtype, sample_positions
from spiel_kernels.index_set import PerIndexSet, row_bounds, rows_and_columns

from .oracle import property_test


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def size_and_count(draw: st.DrawFn) -> tuple[int, int]:
    numel = draw(st.integers(0, 400))
    return numel, draw(st.integers(0, numel))


@property_test
@given(size_and_count(), st.integers(0, 2**32))
def test_sample_is_an_index_set_of_k(size: tuple[int, int], seed: int) -> None:
    numel, k = size
    drawn = sample_positions(numel, k, generator(seed))
    assert drawn.dtype == torch.int64 and drawn.device.type == "cpu"
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert drawn.numel() == k
    assert all(0 <= position < numel for position in drawn.tolist())
    assert torch.equal(drawn, sample_positions(numel, k, generator(seed)))


@pytest.mark.parametrize("k", [3, 9, 12], ids=["sparse", "dense", "half-plus"])
def test_sample_is_uniform(k: int) -> None:
    """Each of 16 positions is drawn in k/16 of the draws, within five standard deviations."""
    draws, source = 4000, generator(1)
    counts = torch.zeros(16)
    for _ in range(draws):
        counts[sample_positions(16, k, source)] += 1
    share = k / 16
    assert (counts / draws - share).abs().max() < 5 * (share * (1 - share) / draws) ** 0.5


def test_sample_of_a_weight_beyond_int32() -> None:
    drawn = sample_positions(2**40, 1000, generator(0))
    assert drawn.numel() == 1000 and int(drawn.max()) > 2**31


@pytest.mark.parametrize("k", [-1, 6])
def test_sample_refuses_impossible_counts(k: int) -> None:
    with pytest.raises(ValueError, match=f"k must be between 0 and numel=5, got {k}"):
        sample_positions(5, k, generator(0))


@pytest.mark.parametrize("numel, dtype", [(1, torch.int32), (2**31 - 1, torch.int32), (2**31, torch.int64)])
def test_index_dtype(numel: int, dtype: torch.dtype) -> None:
    assert index_dtype(numel) == dtype


@property_test
@given(st.lists(st.integers(-3, 30), max_size=12), st.sampled_from([torch.int32, torch.int64]))
def test_check_accepts_exactly_the_sorted_unique_positions_in_range(positions: list[int], dtype: torch.dtype) -> None:
    good = positions == sorted(set(positions)) and all(0 <= p < 25 for p in positions)
    verdict = check_index_set(torch.tensor(positions, dtype=dtype), 25)
    assert (verdict is None) == (good and dtype == torch.int32)
    bound_free = check_index_set(torch.tensor(positions, dtype=dtype), None)
    assert (bound_free is None) == (positions == sorted(set(positions)) and all(p >= 0 for p in positions))


@pytest.mark.parametrize(
    "indices, phrase",
    [
        (torch.zeros(2, 2, dtype=torch.int32), r"must be one-dimensional, got shape \(2, 2\)"),
        (torch.tensor(3, dtype=torch.int32), r"must be one-dimensional, got shape \(\)"),
        (torch.tensor([1], dtype=torch.int64), "must have dtype torch.int32, got torch.int64"),
        (torch.tensor([1.0]), "must have dtype torch.int32, got torch.float32"),
        (torch.tensor([True]), "must have dtype torch.int32, got torch.bool"),
        (torch.tensor([-1, 2], dtype=torch.int32), r"has a negative position \(-1\)"),
        (torch.tensor([1, 10], dtype=torch.int32), r"has a position out of range \(10 in a weight of 10 elements\)"),
        (torch.tensor([2, 1], dtype=torch.int32), "is not sorted"),
        (torch.tensor([1, 4, 4], dtype=torch.int32), r"holds a position more than once \(4\)"),
        (torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32), "has a negative position"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_check_says_what_is_wrong(indices: torch.Tensor, phrase: str) -> None:
    assert re.match(phrase, check_index_set(indices, 10) or "nothing")


def test_check_of_a_large_weight_wants_int64() -> None:
    assert check_index_set(torch.tensor([0, 2**31]), 2**33) is None
    assert "must have dtype torch.int64" in (check_index_set(torch.tensor([0], dtype=torch.int32), 2**33) or "")
    assert check_index_set(torch.empty(0, dtype=torch.int32), 10) is None
    assert "or" in (check_index_set(torch.empty(0), None) or "")


def test_rows_and_columns_beyond_int32() -> None:
    """Rows and columns of flat positions up to 2**50, at the ends of a row."""
    for cols in (3, 2**20 + 1, 2**25 - 39):
        rows = torch.tensor([0, 1, 2**50 // cols - 1])
        for col in (0, 1, cols // 2, cols - 1):
            got = rows_and_columns(rows * cols + col, cols)
            assert torch.equal(got[0], rows) and (got[1] == col).all()


@pytest.mark.parametrize("rows, cols, block_rows", [(7, 3, 1), (7, 3, 2), (7, 3, 7), (7, 3, 9), (2**16, 2**15, 2**14)])
def test_row_bounds(rows: int, cols: int, block_rows: int) -> None:
    """Also in a matrix of 2**31 entries with int32 positions: the end of the last block is not an int32."""
    positions = sample_positions(min(rows * cols, 2**31 - 1), 15, generator(0)).to(torch.int32)
    ends = [min(first + block_rows, rows) * cols for first in range(0, rows, block_rows)]
    expected = [0, *(sum(p < end for p in positions.tolist()) for end in ends)]
    got = row_bounds(positions, rows, cols, block_rows)
    assert got.dtype == torch.int64 and got.tolist() == expected


def test_a_result_is_kept_until_the_indices_change() -> None:
    results: PerIndexSet[int] = PerIndexSet()
    indices, computed = torch.tensor([1, 4]), iter(range(10))

    def get(key: int) -> int:
        return results.get(indices, (key,), lambda: next(computed))

    assert [get(5), get(5)] == [0, 0]
    indices += 1
    assert [get(5), get(5), get(6), get(5)] == [1, 1, 2, 3]
    with torch.inference_mode():
        indices = torch.tensor([1, 4])
    assert [get(5), get(5)] == [4, 5]
