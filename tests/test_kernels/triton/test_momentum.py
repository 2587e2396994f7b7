"""SM3's step on active positions by Triton: bit for bit what PyTorch computes."""

from __future__ import annotations

import math

import pytest
import torch

from spiel_kernels import sm3_accumulate_
from spiel_kernels.dispatch import use_backend

from ..oracle import draw_indices

SHAPES = [(1, 1), (1, 300), (300, 1), (5, 7), (3, 200)]


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0], ids=["none", "some", "all"])
@pytest.mark.parametrize("rows, cols", SHAPES)
def test_equals_pytorch(
    rows: int, cols: int, share: float, index_dtype: torch.dtype, gradient_dtype: torch.dtype, device: str
) -> None:
    """Some rows have more entries than one block; some rows and columns have none."""
    k = int(share * rows * cols)
    indices = draw_indices(rows * cols, k, index_dtype).to(device)
    row, col = torch.rand(rows, device=device), torch.rand(cols, device=device)
    expected_row, expected_col = row.clone(), col.clone()
    for _ in range(3):
        gradient = torch.randn(k, device=device).to(gradient_dtype)
        with use_backend("torch"):
            expected = sm3_accumulate_(expected_row, expected_col, indices, gradient)
        with use_backend("triton"):
            nu = sm3_accumulate_(row, col, indices, gradient)
        assert nu.dtype == torch.float32 and torch.equal(nu, expected)
        assert torch.equal(row, expected_row) and torch.equal(col, expected_col)


def test_rows_with_one_entry_each(device: str) -> None:
    """The accumulator of a column takes the largest of its entries, whichever program computes it."""
    row, col = torch.zeros(50, device=device), torch.zeros(3, device=device)
    indices = (torch.arange(50, device=device) * 3 + 1).int()
    gradient = torch.randn(50, device=device)
    with use_backend("triton"):
        nu = sm3_accumulate_(row, col, indices, gradient)
    assert torch.equal(nu, gradient.square()) and torch.equal(row, nu)
    assert col.tolist() == [0.0, float(nu.max()), 0.0]


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_infinite_and_nan_gradients_stay_visible(sign: int, device: str) -> None:
    row, col = torch.ones(2, device=device), torch.ones(3, device=device)
    gradient = torch.tensor([math.inf, math.copysign(math.nan, sign)], device=device)
    with use_backend("triton"):
        nu = sm3_accumulate_(row, col, torch.tensor([0, 2], device=device), gradient).tolist()
    assert nu[0] == math.inf and math.isnan(nu[1])
    row, col = row.tolist(), col.tolist()
    assert math.isnan(row[0]) and row[1] == 1 and col[:2] == [math.inf, 1] and math.isnan(col[2])


def test_strided_and_wide_operands_stay_with_pytorch(device: str) -> None:
    indices = draw_indices(20, 6).to(device)
    for row, col in (
        (torch.rand(8, device=device)[::2], torch.rand(5, device=device)),
        (torch.rand(4, device=device).double(), torch.rand(5, device=device).double()),
    ):
        expected_row, expected_col = row.clone(), col.clone()
        gradient = torch.randn(12, device=device)[::2]
        with use_backend("torch"):
            expected = sm3_accumulate_(expected_row, expected_col, indices, gradient)
        with use_backend("triton"):
            assert torch.equal(sm3_accumulate_(row, col, indices, gradient), expected)
        assert torch.equal(row, expected_row) and torch.equal(col, expected_col)


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("side", ["row", "col"])
def test_accumulators_that_are_nan_stay_so_and_spread_as_in_pytorch(side: str, sign: int, device: str) -> None:
    """A minimum that ignores NaN would go on with the other accumulator, as if nothing had happened."""
    results = []
    for backend in ("torch", "triton"):
        row, col = torch.ones(3, device=device), torch.ones(4, device=device)
        (row if side == "row" else col)[1] = math.copysign(math.nan, sign)
        indices = torch.tensor([0, 1, 4, 7, 10], device=device)
        with use_backend(backend):
            nu = sm3_accumulate_(row, col, indices, torch.full((5,), 0.5, device=device))
        results.append([tensor.isnan().tolist() for tensor in (nu, row, col)])
    assert results[0] == results[1] and any(results[0][0])
