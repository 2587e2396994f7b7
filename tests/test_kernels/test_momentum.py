"""SM3's accumulators, and the positions to grow at from their outer sum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tensors import OpRecorder, assert_close

from spiel_kernels import momentum, sm3_accumulate_, top_outer_positions, top_outer_positions_padded
from spiel_kernels.momentum import top_outer_positions_dense

from .oracle import draw_indices, property_test

DTYPES = [torch.float64, torch.float32]


def dense_sm3_ii(gradients: list[torch.Tensor]) -> tuple[list[float], list[float], torch.Tensor]:
    """Algorithm SM3-II of Anil et al. for all entries of a matrix, covered by its rows and columns, in loops."""
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_chunks_are_one_step(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Every position reads the accumulators from before the step, whatever the size of the chunks."""
    row, col = torch.rand(9, dtype=dtype), torch.rand(7, dtype=dtype)
    indices, gradient = draw_indices(63, 40, torch.int32), torch.randn(40, dtype=dtype)
    expected_row, expected_col = row.clone(), col.clone()
    expected = sm3_accumulate_(expected_row, expected_col, indices, gradient)
    monkeypatch.setattr(momentum, "_CHUNK", 3)
    assert torch.equal(sm3_accumulate_(row, col, indices, gradient), expected)
    assert torch.equal(row, expected_row) and torch.equal(col, expected_col)


def test_accumulators_and_gradients_may_be_strided() -> None:
    row, col, gradient = torch.rand(8)[::2], torch.rand(9)[::3], torch.randn(12)[::2]
    expected_row, expected_col = row.clone(), col.clone()
    indices = draw_indices(12, 6)
    expected = sm3_accumulate_(expected_row, expected_col, indices, gradient.clone())
    assert torch.equal(sm3_accumulate_(row, col, indices, gradient), expected)
    assert torch.equal(row, expected_row) and torch.equal(col, expected_col)


def test_infinite_and_nan_gradients_stay_visible() -> None:
    row, col = torch.ones(2), torch.ones(3)
    nu = sm3_accumulate_(row, col, torch.tensor([0, 2]), torch.tensor([math.inf, math.nan]))
    assert nu[0] == math.inf and nu[1].isnan()
    assert row[0].isnan() and row[1] == 1 and col[0] == math.inf and col[1] == 1 and col[2].isnan()


@pytest.mark.parametrize("gradient", [torch.ones(2), torch.ones(3, 1), torch.tensor(1.0)])
def test_a_gradient_of_another_size_is_refused(gradient: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="gradient must have one entry per position"):
        sm3_accumulate_(torch.ones(4), torch.ones(4), torch.arange(3), gradient)


def test_accumulators_of_two_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"row and col must have the same dtype, got torch.float32 and torch.float64"):
        sm3_accumulate_(torch.ones(4), torch.ones(4).double(), torch.arange(3), torch.ones(3))


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


# Powers of two: sums of their logs do not round, so that ties stay ties.
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


@contextmanager
def search(rounds: int, spare: int, listable: int | None) -> Iterator[None]:
    """Searches with other settings: most rounds, the surplus that ends the search, how many may be listed."""
    limits = {} if listable is None else {"_listable": lambda scores, m: listable}
    with patch.multiple(momentum, _ROUNDS=rounds, _SPARE=spare, **limits):
        yield


WAYS = {
    "plain": (64, 64, None),
    "to the last candidate": (64, 0, 10**9),
    "too few rounds": (3, 0, None),
    "exact": (64, 0, -1),
}


@st.composite
def accumulators(draw: st.DrawFn) -> list[float]:
    """Equal, almost equal, tiny, huge, zero, infinite or invalid entries."""
    size = draw(st.integers(1, 12))
    one = draw(
        st.sampled_from(
            [
                st.just(draw(st.sampled_from([0.0, 0.3, 1.0]))),
                st.sampled_from([0.0, 1.0, 2.0, 4.0]),
                st.integers(-3, 3).map(lambda step: 1.0 + step * 2.0**-52),
                st.floats(1e-38, 1e38),
                st.sampled_from([0.0, 1.0, 3.0, math.inf, math.nan, -1.0]),
            ]
        )
    )
    return draw(st.lists(one, min_size=size, max_size=size))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@property_test
@given(row=accumulators(), col=accumulators(), data=st.data())
def test_growth_equals_the_dense_formula(
    way: str, dtype: torch.dtype, row: list[float], col: list[float], data: st.DataObject
) -> None:
    """Exact to the last bit of the scores, with near ties, ties and infinities."""
    numel = len(row) * len(col)
    excluded = data.draw(
        st.one_of(
            st.sets(st.integers(0, numel - 1)),
            st.integers(0, numel - 1).map(lambda left: set(range(numel)) - {left}),
            st.just(set(range(numel))),
        )
    )
    m = data.draw(st.integers(0, numel + 3))
    arguments = (torch.tensor(row, dtype=dtype), torch.tensor(col, dtype=dtype), torch.tensor(sorted(excluded)).int())
    with search(*WAYS[way]):
        got = top_outer_positions(*arguments, m)
    assert got.tolist() == top_outer_positions_dense(*arguments, m).tolist()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows, cols", [(1, 400), (400, 1), (60, 41), (23, 97)])
@pytest.mark.parametrize("share, wanted", [(0.0, 0.002), (0.1, 0.1), (0.9, 0.2), (1.0, 0.5)])
@pytest.mark.parametrize("kind", ["spread", "bf16", "equal"])
def test_growth_in_larger_matrices(way: str, rows: int, cols: int, share: float, wanted: float, kind: str) -> None:
    def accumulator(size: int) -> torch.Tensor:
        values = {
            "spread": lambda: torch.randn(size).mul(4).exp(),
            "bf16": lambda: torch.randn(size).bfloat16().float().square(),
            "equal": lambda: torch.full((size,), 0.3),
        }[kind]()
        values[3::5] = 0
        return values

    row, col = accumulator(rows), accumulator(cols)
    excluded = draw_indices(rows * cols, int(share * rows * cols), torch.int32)
    m = int(wanted * rows * cols)
    with search(*WAYS[way]):
        got = top_outer_positions(row, col, excluded, m)
    assert torch.equal(got, top_outer_positions_dense(row, col, excluded, m))


@pytest.mark.parametrize("share, m", [(0.0, 0), (0.5, 7), (0.5, 12), (0.5, 40), (1.0, 3)])
def test_missing_positions_are_padded(share: float, m: int) -> None:
    row, col = torch.rand(4), torch.rand(6)
    excluded = draw_indices(24, int(24 * share), torch.int32)
    expected = top_outer_positions(row, col, excluded, m).tolist()
    got = top_outer_positions_padded(row, col, excluded, m)
    assert got.dtype == torch.int64 and got.tolist() == expected + [-1] * (m - len(expected))


def test_all_positions_of_an_empty_matrix_are_missing() -> None:
    got = top_outer_positions_padded(torch.ones(0), torch.ones(3), torch.empty(0, dtype=torch.int32), 2)
    assert got.tolist() == [-1, -1]


@pytest.mark.parametrize("way", WAYS)
def test_growth_among_scores_that_differ_in_their_last_bits(way: str) -> None:
    """Comparisons with ``threshold - log_row`` round otherwise than the scores do; the result must not depend on it."""
    for _ in range(40):
        row, col = (
            (1 + torch.randint(-6, 7, (size,)).double() * 2.0**-52)
            * torch.tensor([3.0, 7.0, 1e-5])[torch.arange(size) % 3]
            for size in (8, 9)
        )
        excluded = draw_indices(72, 20)
        with search(*WAYS[way]):
            got = top_outer_positions(row, col, excluded, 12)
        assert torch.equal(got, top_outer_positions_dense(row, col, excluded, 12))


@pytest.mark.parametrize("kind", ["spread", "equal", "two values"])
@pytest.mark.parametrize("rows, cols", [(300, 200), (200, 300)])
def test_growth_forms_nothing_of_the_size_of_the_matrix(kind: str, rows: int, cols: int) -> None:
    """Ties that fill the matrix are not all listed."""
    sides = {
        "spread": lambda size: torch.rand(size),
        "equal": lambda size: torch.full((size,), 0.7),
        "two values": lambda size: torch.where(torch.arange(size) % 2 == 0, 1.0, 2.0),
    }
    row, col = sides[kind](rows), sides[kind](cols)
    excluded = draw_indices(rows * cols, 600, torch.int32)
    with OpRecorder() as recorder:
        got = top_outer_positions(row, col, excluded, 120)
    assert torch.equal(got, top_outer_positions_dense(row, col, excluded, 120))
    assert recorder.largest <= 2 * (rows + cols + excluded.numel() + 120)


def test_products_that_underflow_are_still_ranked() -> None:
    row, col = torch.tensor([1e-30, 1e-20]), torch.tensor([1e-30, 1e-25])
    assert top_outer_positions(row, col, torch.empty(0, dtype=torch.int64), 3).tolist() == [3, 2, 1]


@pytest.mark.parametrize("rows, cols", [(0, 4), (4, 0), (0, 0)])
def test_growth_in_an_empty_matrix(rows: int, cols: int) -> None:
    got = top_outer_positions(torch.ones(rows), torch.ones(cols), torch.empty(0, dtype=torch.int32), 3)
    assert got.dtype == torch.int64 and got.numel() == 0


def test_growth_takes_strided_and_low_precision_accumulators() -> None:
    row, col = torch.rand(20).bfloat16()[::2], torch.rand(18).bfloat16()[::3]
    excluded = draw_indices(60, 20)[::2]
    expected = best_positions(row.tolist(), col.tolist(), set(excluded.tolist()), 25)
    assert top_outer_positions(row, col, excluded, 25).tolist() == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.ones(2), torch.ones(2), torch.arange(1), -1), "m must be at least 0, got -1"),
        ((torch.ones(2, 1), torch.ones(2), torch.arange(1), 1), r"row must be one-dimensional, got shape \(2, 1\)"),
        ((torch.ones(2), torch.tensor(1.0), torch.arange(1), 1), r"col must be one-dimensional, got shape \(\)"),
        ((torch.ones(2), torch.ones(2), torch.ones(1, 1), 1), r"excluded must be one-dimensional, got shape \(1, 1\)"),
    ],
    ids=["m", "row", "col", "excluded"],
)
def test_growth_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_outer_positions(*arguments)


def test_registered_operations() -> None:
    row, col, indices = torch.rand(6), torch.rand(5), draw_indices(30, 9, torch.int32)
    torch.library.opcheck(torch.ops.spiel_kernels.sm3_accumulate_, (row, col, indices, torch.randn(9)))
    torch.library.opcheck(torch.ops.spiel_kernels.top_outer_positions, (row, col, indices, 4))


def test_compiled_without_graph_breaks() -> None:
    def step(row: torch.Tensor, col: torch.Tensor, indices: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        sm3_accumulate_(row, col, indices, gradient)
        return top_outer_positions(row, col, indices, 4) + 1

    arguments = torch.rand(6), torch.rand(5), draw_indices(30, 9, torch.int32), torch.randn(9)
    copies = [argument.clone() for argument in arguments]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*copies), step(*arguments))
    assert torch.equal(copies[0], arguments[0]) and torch.equal(copies[1], arguments[1])
