"""Momentum growth on a GPU: positions as from the dense formula, SM3's accumulators as on the CPU."""

from __future__ import annotations

import warnings

import pytest
import torch

from spiel_kernels import momentum, sm3_accumulate_, top_outer_positions, top_outer_positions_padded
from spiel_kernels.dispatch import use_backend
from spiel_kernels.momentum import top_outer_positions_dense

pytestmark = pytest.mark.gpu


def accumulator(size: int, kind: str) -> torch.Tensor:
    values = {
        "spread": lambda: torch.randn(size).mul(2).exp(),
        "bf16": lambda: torch.randn(size).bfloat16().float().square(),
        "equal": lambda: torch.full((size,), 0.3),
        "infinite": lambda: torch.where(torch.arange(size) % 7 == 0, torch.inf, torch.rand(size)),
    }[kind]()
    values[3::5] = 0
    return values.cuda()


@pytest.mark.parametrize("kind", ["spread", "bf16", "equal", "infinite"])
@pytest.mark.parametrize("rows, cols, share", [(1, 5000, 0.1), (700, 900, 0.01), (2000, 600, 0.05), (40, 30, 1.0)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_growth_equals_the_dense_formula(rows: int, cols: int, share: float, kind: str, backend: str) -> None:
    row, col = accumulator(rows, kind), accumulator(cols, kind)
    k = int(share * rows * cols)
    excluded = torch.randperm(rows * cols)[:k].sort().values.int().cuda()
    for m in (1, k // 5 + 1, k + 1):
        with use_backend(backend):
            got = top_outer_positions(row, col, excluded, m)
        assert torch.equal(got, top_outer_positions_dense(row, col, excluded, m))


@pytest.mark.parametrize("rows, cols", [(4096, 4096), (11008, 4096), (4096, 11008)])
@pytest.mark.parametrize("wanted", [1.0, 0.2, 0.01])
def test_growth_at_the_sizes_of_a_large_model(rows: int, cols: int, wanted: float) -> None:
    row, col = accumulator(rows, "spread"), accumulator(cols, "spread")
    excluded = torch.randint(rows * cols, (500_000,)).unique().int().cuda()
    m = int(wanted * excluded.numel())
    got = top_outer_positions(row, col, excluded, m)
    assert torch.equal(got, top_outer_positions_dense(row, col, excluded, m))


def test_growth_by_exact_bisection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(momentum, "_listable", lambda scores, m: -1)
    row, col = accumulator(500, "spread"), accumulator(300, "bf16")
    excluded = torch.randperm(150_000)[:1500].sort().values.int().cuda()
    with use_backend("torch"):
        got = top_outer_positions(row, col, excluded, 300)
    assert torch.equal(got, top_outer_positions_dense(row, col, excluded, 300))


def test_growth_does_not_wait_for_the_device() -> None:
    row, col = accumulator(700, "spread"), accumulator(900, "spread")
    excluded = torch.randperm(630_000)[:6300].sort().values.int().cuda()
    top_outer_positions_padded(row, col, excluded, 1260)
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            top_outer_positions_padded(row, col, excluded, 1260)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert not [w for w in caught if "synchroniz" in str(w.message)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, cols, share", [(1, 5000, 0.3), (700, 900, 0.01), (3000, 40, 1.0)])
def test_accumulators_equal_those_of_the_cpu(
    rows: int, cols: int, share: float, gradient_dtype: torch.dtype, backend: str
) -> None:
    k = int(share * rows * cols)
    indices = torch.randperm(rows * cols)[:k].sort().values.int()
    row, col = torch.rand(rows), torch.rand(cols)
    on_gpu = row.cuda(), col.cuda()
    for _ in range(3):
        gradient = torch.randn(k).to(gradient_dtype)
        expected = sm3_accumulate_(row, col, indices, gradient)
        with use_backend(backend):
            nu = sm3_accumulate_(*on_gpu, indices.cuda(), gradient.cuda())
        torch.testing.assert_close(nu.cpu(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(on_gpu[0].cpu(), row, rtol=1e-6, atol=0)
    torch.testing.assert_close(on_gpu[1].cpu(), col, rtol=1e-6, atol=0)
