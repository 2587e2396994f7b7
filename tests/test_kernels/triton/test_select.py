"""The Triton selection of gradient entries, against a sort of all of them."""

from __future__ import annotations

import math

import pytest
import torch
from support.tensors import assert_close
from torch import Tensor

from spiel_kernels.triton_backend import select
from spiel_kernels.triton_backend.select import largest_outer, sampled_bound, topk_outer

from ..oracle import small_integers, top_positions

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def expected_positions(a: Tensor, b: Tensor, k: int) -> list[int]:
    return top_positions((a.cpu().double().T @ b.cpu().double()).abs().flatten().tolist(), k)


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row blocks of five rows, and a sample and a pool that are small compared with the matrix."""
    monkeypatch.setattr(select, "dense_block_rows", lambda rows, cols: min(rows, 5))
    monkeypatch.setattr(select, "_SAMPLE_ROWS", 8)
    monkeypatch.setattr(select, "_SAMPLE_ENTRIES", 1)
    monkeypatch.setattr(select, "_AIM_SPARE", 4)
    monkeypatch.setattr(select, "_ROOM_SPARE", 40)


@pytest.fixture
def never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise AssertionError("fell back to the selection that waits for the device")

    monkeypatch.setattr(select, "_topk_waiting", fail)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, rows, cols", [(1, 1, 1), (3, 1, 70), (2, 65, 3), (0, 4, 5), (6, 13, 21)])
@pytest.mark.parametrize("k", [0, 1, 9, 10**6], ids=["k0", "k1", "k9", "all"])
def test_ties_and_zeros(n: int, rows: int, cols: int, k: int, dtype: torch.dtype, device: str) -> None:
    a, b = small_integers(n, rows).to(device, dtype), small_integers(n, cols).to(device, dtype)
    got = topk_outer(a, b, k)
    assert got.dtype == torch.int64 and got.device.type == device
    assert got.tolist() == expected_positions(a, b, k)


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("k", [1, 20, 100, 500, 1343])
@pytest.mark.parametrize("seed", range(3))
def test_many_blocks_with_ties(k: int, seed: int, device: str) -> None:
    """So many scores tie that the bound ties too, and more entries reach it than the pool takes."""
    torch.manual_seed(seed)
    a, b = small_integers(3, 64).to(device), small_integers(3, 21).to(device)
    assert topk_outer(a, b, k).tolist() == expected_positions(a, b, k)


@pytest.mark.usefixtures("tiny_blocks", "never_waits")
@pytest.mark.parametrize("k", [1, 64, 512])
@pytest.mark.parametrize("heavy", ["first", "last", "spread"])
def test_rows_of_any_size_need_no_second_pass(k: int, heavy: str, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The pool holds the best entries and does not overflow, wherever the large rows are."""
    monkeypatch.setattr(select, "_SAMPLE_ROWS", 64)
    monkeypatch.setattr(select, "_AIM_SPARE", 16)
    monkeypatch.setattr(select, "_ROOM_SPARE", 100)
    monkeypatch.setattr(select, "dense_block_rows", lambda rows, cols: 100)
    a, b = torch.randn(20, 256), torch.randn(20, 40)
    size = torch.randn(256).mul(1.5).exp()
    a *= {"first": size.sort(descending=True).values, "last": size.sort().values, "spread": size}[heavy]
    a, b = a.to(device), b.to(device)
    scores = torch.cat([select.outer_block(a[:, i : i + 100], b) for i in (0, 100, 200)]).abs().flatten().tolist()
    assert topk_outer(a, b, k).tolist() == top_positions(scores, k)


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("misleading", [math.inf, 1e-30], ids=["too high", "too low"])
def test_a_sample_that_misleads(misleading: float, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    waited = []
    waiting = select._topk_waiting
    monkeypatch.setattr(select, "_topk_waiting", lambda *arguments: waited.append(1) or waiting(*arguments))
    monkeypatch.setattr(select, "sampled_bound", lambda a, b, k: torch.full((1,), misleading, device=device))
    a, b = small_integers(3, 64).to(device), small_integers(3, 21).to(device)
    assert topk_outer(a, b, 50).tolist() == expected_positions(a, b, 50)
    assert waited


@pytest.mark.usefixtures("tiny_blocks")
def test_fewer_entries_than_wanted(device: str) -> None:
    """Entries that are zero are never chosen, even if fewer than k are not zero."""
    a, b = torch.zeros(2, 60, device=device), torch.ones(2, 40, device=device)
    a[0, 17] = 1
    a[1, 44] = -3
    assert topk_outer(a, b, 100).tolist() == [*range(17 * 40, 18 * 40), *range(44 * 40, 45 * 40)]
    assert topk_outer(a, b, 10).tolist() == list(range(44 * 40, 44 * 40 + 10))
    assert topk_outer(a * 0, b, 10).tolist() == []


@pytest.mark.usefixtures("tiny_blocks")
def test_values_that_are_not_finite(device: str) -> None:
    """NaN is never chosen, infinity first."""
    a, b = small_integers(3, 60), small_integers(3, 40)
    a[0, 7], a[1, 20], b[2, 3] = math.nan, math.inf, math.nan
    a, b = a.to(device), b.to(device)
    scores = torch.cat([select.outer_block(a[:, i : i + 5], b) for i in range(0, 60, 5)]).abs().flatten()
    for k in (5, 60, 900):
        assert topk_outer(a, b, k).tolist() == top_positions(scores.tolist(), k)


@pytest.mark.usefixtures("tiny_blocks")
def test_strided_operands(device: str) -> None:
    a, b = small_integers(60, 4).to(device).T, small_integers(8, 80).to(device)[::2, ::2]
    assert topk_outer(a, b, 30).tolist() == expected_positions(a, b, 30)


def test_the_sample_predicts_the_bound() -> None:
    """Rows sorted by norm are sampled evenly, so that a few large rows do not mislead."""
    a = torch.randn(32, 2048) * torch.randn(2048).mul(1.5).exp()
    b = torch.randn(32, 256) * torch.randn(256).exp()
    scores = (a.T @ b).abs()
    for k in (2048, 8192):
        found = int((scores >= sampled_bound(a, b, k)).sum())
        assert 1.05 * k < found < 1.5 * k


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("n, rows, cols, k", [(5, 65, 30, 40), (3, 4, 5, 20), (2, 300, 3, 500), (1, 1, 1, 1)])
def test_without_waiting(n: int, rows: int, cols: int, k: int, dtype: torch.dtype, device: str) -> None:
    a, b = torch.randn(n, rows).to(device, dtype), torch.randn(n, cols).to(device, dtype)
    a[:, : rows // 2] = 0  # so that there may be fewer than k
    positions, values, found = largest_outer(a, b, k)
    count, sound = found.tolist()
    product = (a.double().T @ b.double()).flatten()
    assert sound and count == min(k, int((product != 0).sum()))
    assert positions.shape == values.shape == (k,)
    assert positions[:count].tolist() == expected_positions(a, b, k)
    assert_close(values[:count], product[positions[:count]], 1e-5)
    assert (positions[count:] == rows * cols - 1).all() and not values[count:].any()


@pytest.mark.usefixtures("tiny_blocks")
def test_a_sample_that_misleads_is_reported(device: str) -> None:
    """One row holds all large entries, and the sample does not see it."""
    a, b = torch.ones(1, 64, device=device) * 1e-3, torch.rand(1, 40, device=device) + 0.5
    a[0, 63] = 1.0
    unsound = [k for k in range(100, 2000, 100) if not largest_outer(a, b, k)[2][1]]
    assert unsound
    for k in unsound:
        assert topk_outer(a, b, k).tolist() == expected_positions(a, b, k)
