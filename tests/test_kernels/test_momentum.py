"""SM3's accumulators and growth from their outer sum."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import OpRecorder, assert_close
from hypothesis import given
from hypothesis import strategies as st

from spiel_kernels import momentum, sm3_accumulate_, top_outer_positions

from .oracle import draw_indices, property_test

DTYPES = [torch.float64, torch.float32]


def dense_sm3_ii(gradients: list[torch.Tensor]) -> tuple[list[float], list[float], torch.Tensor]:
    """Algorithm SM3-II of Anil et al. with the cover of rows and columns, in loops."""
    rows, cols = gradients[0].shape
    row, col = [0.0] * rows, [0.0] * cols
    nu = torch.zeros(rows, cols, dtype=torch.float64)
    for gradient in gradients:
        new_row, new_col = [0.0] * rows, [0.0] * cols
        for r in range(rows):
            for c in range(cols):
                nu[r, c] = min(row[r], col[c]) + float(gradient[r, c]) ** 2
                new_row[r] = max(new_row[r], float(nu[r, c]))
                new_col[c] = max(new_col[c], float(nu[r, c]))
        row, col = new_row, new_col
    return row, col, nu


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (4, 6)], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_full_index_set_is_sm3_ii(shape: tuple[int, int], index_dtype: torch.dtype) -> None:
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(5)]
    row, col = torch.zeros(shape[0], dtype=torch.float64), torch.zeros(shape[1], dtype=torch.float64)
    every = torch.arange(row.numel() * col.numel(), dtype=index_dtype)
    for gradient in gradients:
        nu = sm3_accumulate_(row, col, every, gradient.flatten())
    expected_row, expected_col, expected_nu = dense_sm3_ii(gradients)
    assert_close(nu.view(shape), expected_nu, 1e-14)
    assert_close(row, torch.tensor(expected_row, dtype=torch.float64), 1e-14)
    assert_close(col, torch.tensor(expected_col, dtype=torch.float64), 1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [0, 1, 7])
def test_sparse_step_touches_rows_and_columns_of_active_positions_only(k: int, dtype: torch.dtype) -> None:
    row, col = torch.rand(5, dtype=dtype), torch.rand(4, dtype=dtype)
    before_row, before_col = row.tolist(), col.tolist()
    indices, gradient = draw_indices(20, k), torch.randn(k, dtype=torch.bfloat16)
    nu = sm3_accumulate_(row, col, indices, gradient)
    expected_row, expected_col = list(before_row), list(before_col)
    for slot, position in enumerate(indices.tolist()):
        r, c = divmod(position, 4)
        value = min(before_row[r], before_col[c]) + float(gradient[slot]) ** 2
        assert math.isclose(float(nu[slot]), value, rel_tol=1e-6)
        expected_row[r] = max(expected_row[r], value)
        expected_col[c] = max(expected_col[c], value)
    assert nu.dtype == dtype
    assert_close(row, torch.tensor(expected_row, dtype=torch.float64), 1e-6)
    assert_close(col, torch.tensor(expected_col, dtype=torch.float64), 1e-6)


@property_test
@given(st.lists(st.tuples(st.integers(0, 11), st.floats(-10, 10)), max_size=30))
def test_accumulators_never_shrink(steps: list[tuple[int, float]]) -> None:
    row, col = torch.zeros(3), torch.zeros(4)
    for position, value in steps:
        before = row.clone(), col.clone()
        sm3_accumulate_(row, col, torch.tensor([position]), torch.tensor([value]))
        assert (row >= before[0]).all() and (col >= before[1]).all()


def best_positions(row: list[float], col: list[float], excluded: set[int], m: int) -> list[int]:
    """The m best by log row + log col, best first, ties by position; zeros are no candidates."""
    scores = {}
    for r, row_value in enumerate(row):
        for c, col_value in enumerate(col):
            position = r * len(col) + c
            if row_value > 0 and col_value > 0 and position not in excluded:
                scores[position] = math.log(row_value) + math.log(col_value)
    return sorted(scores, key=lambda position: (-scores[position], position))[:m]


# Powers of two: their logs add up without rounding differences that would break ties.
ACCUMULATORS = st.lists(st.sampled_from([0.0, 1.0, 2.0, 4.0]), min_size=1, max_size=6)


@property_test
@given(ACCUMULATORS, ACCUMULATORS, st.data())
def test_growth_equals_sorting_everything(row: list[float], col: list[float], data: st.DataObject) -> None:
    numel = len(row) * len(col)
    excluded = sorted(data.draw(st.sets(st.integers(0, numel - 1))))
    m = data.draw(st.integers(0, numel + 3))
    got = top_outer_positions(torch.tensor(row), torch.tensor(col), torch.tensor(excluded, dtype=torch.int32), m)
    assert got.dtype == torch.int64
    assert got.tolist() == best_positions(row, col, set(excluded), m)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_growth_over_several_blocks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(momentum, "_BLOCK_ENTRIES", 16)
    row, col = torch.rand(23, dtype=dtype), torch.rand(7, dtype=dtype)
    row[::5], col[3] = 0, 0
    excluded = draw_indices(161, 40)
    expected = best_positions(row.tolist(), col.tolist(), set(excluded.tolist()), 60)
    assert top_outer_positions(row, col, excluded, 60).tolist() == expected
    with OpRecorder() as recorder:
        top_outer_positions(row, col, excluded, 60)
    assert recorder.largest < 161


def test_products_that_underflow_are_still_ranked() -> None:
    row, col = torch.tensor([1e-30, 1e-20]), torch.tensor([1e-30, 1e-25])
    assert top_outer_positions(row, col, torch.empty(0, dtype=torch.int64), 3).tolist() == [3, 2, 1]
