"""`gather_embedding` and `topk_embedding` against autograd through `F.embedding`."""

from __future__ import annotations

import pytest
import torch
from support.tensors import assert_close
from torch import Tensor
from torch.nn import functional as F

from spiel_kernels import gather_embedding, topk_embedding

from .oracle import DTYPE_IDS, DTYPES, draw_indices, top_positions

ROWS, WIDTH = 9, 4
IDS = {
    "batch": torch.tensor([[0, 3, 3], [8, 3, 5]]),
    "scalar": torch.tensor(4),
    "one-row": torch.tensor([7, 7, 7]),
    "empty": torch.empty(0, dtype=torch.int64),
    "empty-batch": torch.empty(0, 5, dtype=torch.int64),
    "int32": torch.tensor([1, 2, 1], dtype=torch.int32),
}


def dense_gradient(grad_out: Tensor, ids: Tensor, padding_idx: int | None, by_frequency: bool) -> Tensor:
    table = torch.zeros(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    F.embedding(ids, table, padding_idx, scale_grad_by_freq=by_frequency).backward(grad_out.double())
    return table.grad


@pytest.mark.parametrize("padding_idx", [None, 0, 3, 8], ids="padding-{}".format)
@pytest.mark.parametrize("by_frequency", [False, True], ids=["sum", "by-frequency"])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_gather_equals_autograd(ids: Tensor, by_frequency: bool, padding_idx: int | None) -> None:
    grad_out = torch.randn(*ids.shape, WIDTH)
    expected = dense_gradient(grad_out, ids, padding_idx, by_frequency).flatten()
    for k in (0, 13, ROWS * WIDTH):
        indices = draw_indices(ROWS * WIDTH, k, torch.int32)
        got = gather_embedding(grad_out, ids, indices, padding_idx, by_frequency)
        assert got.dtype == torch.float32
        assert_close(got, expected[indices.long()], 1e-6)


@pytest.mark.parametrize("dtype, tolerance", DTYPES, ids=DTYPE_IDS)
def test_gather_accumulates_wide(dtype: torch.dtype, tolerance: float) -> None:
    """One row occurs 3,000 times: a sum in half precision would stop growing."""
    ids = torch.full((3000,), 2)
    grad_out = torch.rand(3000, WIDTH).to(dtype)
    got = gather_embedding(grad_out, ids, torch.arange(ROWS * WIDTH), None, False)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(got, dense_gradient(grad_out, ids, None, False).flatten(), tolerance)


@pytest.mark.parametrize("padding_idx", [None, 3], ids="padding-{}".format)
@pytest.mark.parametrize("by_frequency", [False, True], ids=["sum", "by-frequency"])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_topk_equals_autograd(ids: Tensor, by_frequency: bool, padding_idx: int | None) -> None:
    """Random integers from -2 to 2: ties and zeros are frequent."""
    grad_out = torch.randint(-2, 3, (*ids.shape, WIDTH)).float()
    scores = dense_gradient(grad_out, ids, padding_idx, by_frequency).abs().float().flatten().tolist()
    for k in (0, 1, 5, 1000):
        got = topk_embedding(grad_out, ids, padding_idx, by_frequency, k)
        assert got.dtype == torch.int64
        assert got.tolist() == top_positions(scores, k)


def test_topk_over_more_rows_than_one_block() -> None:
    ids = torch.randperm(2500)
    grad_out = torch.randint(-9, 10, (2500, 2)).double()
    dense = torch.zeros(2500, 2, dtype=torch.float64)
    dense[ids] = grad_out
    for k in (3, 700):
        assert topk_embedding(grad_out, ids, None, False, k).tolist() == top_positions(
            dense.abs().flatten().tolist(), k
        )


def test_strided_gradient() -> None:
    ids = torch.tensor([1, 5, 1])
    grad_out = torch.randn(WIDTH, 3).T
    expected = dense_gradient(grad_out, ids, None, False).flatten()
    assert_close(gather_embedding(grad_out, ids, torch.arange(ROWS * WIDTH), None, False), expected, 1e-6)
