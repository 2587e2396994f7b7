"""Candidate selection on a GPU at the sizes of real layers: `pytest -m gpu`."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from spiel_kernels.triton_backend import select

pytestmark = pytest.mark.gpu


def skewed(n: int, width: int, dtype: torch.dtype) -> Tensor:
    """Operands whose columns differ widely in norm."""
    return (torch.randn(n, width, device="cuda") * torch.randn(width, device="cuda").exp()).to(dtype)


def products(a: Tensor, b: Tensor) -> Tensor:
    """Scores as the selection computes them, block by block; another block size would round otherwise."""
    return torch.cat([block.abs().flatten() for _, block in select._row_blocks(a, b)])


def best(scores: Tensor, k: int) -> Tensor:
    """The k largest positive scores; equal scores: the lower position."""
    order = torch.sort(scores.nan_to_num(0.0, posinf=torch.inf), descending=True, stable=True).indices[:k]
    return order[scores[order] > 0].sort().values


@pytest.fixture
def second_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    waiting = select._topk_waiting
    monkeypatch.setattr(select, "_topk_waiting", lambda a, b, k: made.append(k) or waiting(a, b, k))
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("n, rows, cols", [(512, 4096, 4096), (300, 5000, 1111), (512, 300, 8192)])
@pytest.mark.parametrize("density", [0.0005, 0.01, 0.05])
def test_exact(n: int, rows: int, cols: int, density: float, dtype: torch.dtype, second_passes: list[int]) -> None:
    a, b = skewed(n, rows, dtype), skewed(n, cols, dtype)
    k = round(density * rows * cols)
    got = select.topk_outer(a, b, k)
    assert torch.equal(got, best(products(a, b), k))
    assert not second_passes, "the sample must serve on ordinary gradients"


@pytest.mark.parametrize("k", [1, 1000, 200_000, 2_000_000])
def test_ties(k: int) -> None:
    """Most scores of small integers tie, so that the pool overflows and the blocks are computed again."""
    a, b = (torch.randint(-1, 2, (8, width), device="cuda").bfloat16() for width in (2500, 2000))
    assert torch.equal(select.topk_outer(a, b, k), best((a.double().T @ b.double()).abs().flatten(), k))


def test_zeros_and_nan_are_never_chosen() -> None:
    a, b = skewed(64, 3000, torch.bfloat16), skewed(64, 2000, torch.bfloat16)
    a[:, 100:2900] = 0
    a[3, 50] = torch.nan
    k = 2000 * 200
    got = select.topk_outer(a, b, k)
    assert torch.equal(got, best(products(a, b), k))
    assert got.numel() == 199 * 2000


def test_waits_at_the_end_only() -> None:
    a, b = skewed(256, 8192, torch.bfloat16), skewed(256, 4096, torch.bfloat16)
    select.topk_outer(a, b, 100_000)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            select.topk_outer(a, b, 100_000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(w.message) for w in caught) <= 2


def test_memory_is_bounded() -> None:
    rows, cols, k = 11008, 8192, 500_000
    a, b = skewed(256, rows, torch.bfloat16), skewed(256, cols, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    select.topk_outer(a, b, k)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < (100 << 20) < 4 * rows * cols
