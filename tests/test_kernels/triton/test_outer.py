"""The Triton gather of gradient entries against float64."""

from __future__ import annotations

import pytest
import torch
from support.tensors import assert_close
from torch import Tensor

from spiel_kernels import outer_plan
from spiel_kernels.dispatch import use_backend
from spiel_kernels.gather import gather_planned
from spiel_kernels.outer_plan import TILE_SHAPES, plan_outer
from spiel_kernels.outer_products import gather_by_plan
from spiel_kernels.triton_backend import outer

from ..oracle import draw_indices

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORCED = [("compact", shape) for shape in TILE_SHAPES] + [("dense", None), ("entries", None)]
FORCED_IDS = [f"{method}-{shape[0]}x{shape[1]}" if shape else method for method, shape in FORCED]
# Tokens, rows, columns, positions.
SIZES = [(1, 1, 1, 1), (17, 63, 1, 40), (3, 64, 65, 300), (100, 65, 20, 90), (64, 130, 70, 500), (17, 1, 200, 200)]


def entries(a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
    return (a.double().T @ b.double()).flatten()[indices.long()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method, shape", FORCED, ids=FORCED_IDS)
@pytest.mark.parametrize("n, rows, cols, k", SIZES)
def test_every_method(
    n: int,
    rows: int,
    cols: int,
    k: int,
    method: str,
    shape: tuple[int, int] | None,
    dtype: torch.dtype,
    device: str,
) -> None:
    a, b = torch.randn(n, rows).to(device, dtype), torch.randn(n, cols).to(device, dtype)
    indices = draw_indices(rows * cols, k, torch.int32).to(device)
    plan = plan_outer(indices, rows, cols, n, dtype, method, tile_shape=shape)
    got = outer.gather_outer(a, b, indices, plan)
    assert got.dtype == torch.float32 and got.device.type == device
    # Products of 16-bit numbers are exact in float32; only the sums round.
    assert_close(got, entries(a, b, indices), 1e-5)


@pytest.mark.parametrize("method", ["compact", "entries"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_strided_operands_and_both_index_widths(method: str, index_dtype: torch.dtype, device: str) -> None:
    a, b = torch.randn(70, 9, device=device).T, torch.randn(18, 120, device=device)[::2, ::3]
    indices = draw_indices(70 * 40, 200, index_dtype).to(device)
    strided = torch.stack([indices, indices], 1)[:, 0]
    plan = plan_outer(indices, 70, 40, 9, a.dtype, method)
    assert_close(outer.gather_outer(a, b, strided, plan), entries(a, b, indices), 1e-5)


@pytest.mark.parametrize("method", ["compact", "entries"])
def test_operands_of_two_dtypes_meet_in_the_wider_one(method: str, device: str) -> None:
    indices = draw_indices(30 * 20, 50).to(device)
    plan = plan_outer(indices, 30, 20, 9, torch.float32, method)
    for left, right in ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16)):
        a, b = torch.randn(9, 30).to(device, left), torch.randn(9, 20).to(device, right)
        assert_close(outer.gather_outer(a, b, indices, plan), entries(a, b, indices), 1e-5)


@pytest.mark.parametrize("method", ["compact", "entries", "dense"])
def test_nothing_to_do(method: str, device: str) -> None:
    a, b = torch.randn(5, 6, device=device), torch.randn(5, 7, device=device)
    none, some = torch.empty(0, dtype=torch.int32, device=device), torch.arange(4, device=device)
    assert outer.gather_outer(a, b, none, plan_outer(none, 6, 7, 5, a.dtype, method)).shape == (0,)
    plan = plan_outer(some, 6, 7, 5, a.dtype, method)
    assert outer.gather_outer(a[:0], b[:0], some, plan).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("method", ["compact", "entries", "dense"])
def test_float64_runs_in_pytorch(method: str, device: str) -> None:
    a, b = (torch.randn(5, 6, dtype=torch.float64, device=device) for _ in range(2))
    indices = torch.arange(0, 36, 5, device=device)
    got = outer.gather_outer(a, b, indices, plan_outer(indices, 6, 6, 5, a.dtype, method))
    assert got.dtype == torch.float64
    assert_close(got, entries(a, b, indices), 1e-14)


def test_tokens_are_split_and_tiles_grouped(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Launches compute two tiles each (the last one fewer), in three runs of tokens."""
    monkeypatch.setattr(outer_plan, "TOKENS_PER_SPLIT", 64)
    monkeypatch.setattr(outer, "_WORKSPACE_BYTES", 2 * 3 * 4 * 64 * 64)
    monkeypatch.setattr(outer_plan, "BUSY_PROGRAMS", 15)
    rows, cols, n = 190, 128, 170
    a, b = torch.randn(n, rows, device=device), torch.randn(n, cols, device=device)
    # Blocks of two tiles, one tile and two tiles.
    chosen = torch.zeros(rows, cols, dtype=torch.bool)
    chosen[:64, ::3] = True
    chosen[64:128, ::16] = True
    chosen[128:, 1::2] = torch.rand(62, 64) < 0.3
    indices = chosen.flatten().nonzero().flatten().to(device)
    plan = plan_outer(indices, rows, cols, n, a.dtype, "compact", tile_shape=(64, 64))
    assert plan.tiles.block.numel() in (4, 5)
    launches = []
    kernel = outer.tile_products_kernel

    class Recorder:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(outer, "tile_products_kernel", Recorder())
    assert_close(outer.gather_outer(a, b, indices, plan), entries(a, b, indices), 1e-5)
    assert len(launches) > 1 and all(splits == 3 for _, splits in launches)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_major_copy(n: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(n, 67).to(device, dtype)
    for operand in (x, x.T.contiguous().T, x[:, ::2]):
        turned = outer.token_major(operand, dtype)
        assert turned.shape[1] % 64 == 0 and turned.stride(1) == 1
        assert torch.equal(turned[:, :n], operand.T)
        assert not turned[:, n:].any()


def test_token_major_operands_are_taken_as_they_are(device: str) -> None:
    x = torch.randn(5, 128, device=device).T
    assert outer.token_major(x, x.dtype).data_ptr() == x.data_ptr()
    assert outer.token_major(x, torch.float64).dtype == torch.float64
    assert outer.token_major(x[:100], x.dtype).data_ptr() != x.data_ptr()


def test_several_index_sets_share_the_copies(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    made = []
    token_major = outer.token_major
    monkeypatch.setattr(outer, "token_major", lambda x, dtype: made.append(x) or token_major(x, dtype))
    a, b = torch.randn(5, 66, device=device), torch.randn(5, 30, device=device)
    sets = [draw_indices(66 * 30, k).to(device) for k in (40, 0, 100, 7)]
    methods = ["compact", "compact", "entries", "dense"]
    plans = [plan_outer(s, 66, 30, 5, a.dtype, method) for s, method in zip(sets, methods, strict=True)]
    for got, indices in zip(outer.gather_outer_sets(a, b, sets, plans), sets, strict=True):
        assert_close(got, entries(a, b, indices), 1e-5)
    assert len(made) == 2


def test_values_that_are_not_finite_stay_where_they_belong(device: str) -> None:
    """A tile computes products besides the selected entries; a NaN among them must not reach the selected ones."""
    a, b = torch.randn(5, 66), torch.randn(5, 30)
    a[2, 3], b[1, 7] = torch.inf, torch.nan
    indices = draw_indices(66 * 30, 600).to(device)
    plan = plan_outer(indices, 66, 30, 5, a.dtype, "compact")
    a, b = a.to(device), b.to(device)
    torch.testing.assert_close(
        outer.gather_outer(a, b, indices, plan), gather_by_plan(a, b, indices, plan), equal_nan=True
    )


def test_operands_that_want_gradients(device: str) -> None:
    a, b = (torch.randn(5, 6, device=device, requires_grad=True) for _ in range(2))
    indices = torch.arange(9, device=device)
    got = outer.gather_outer(a, b, indices, plan_outer(indices, 6, 6, 5, a.dtype, "compact"))
    assert not got.requires_grad


def test_chosen_backend_runs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    calls = []
    gather = outer.gather_outer
    monkeypatch.setattr(outer, "gather_outer", lambda *arguments: calls.append(1) or gather(*arguments))
    a, b = torch.randn(5, 6, device=device), torch.randn(5, 6, device=device)
    indices = torch.arange(9, device=device)
    plan = plan_outer(indices, 6, 6, 5, a.dtype, "compact")
    for backend, expected in (("torch", 0), ("triton", 1)):
        with use_backend(backend):
            assert_close(gather_planned(a, b, indices, plan), entries(a, b, indices), 1e-5)
        assert len(calls) == expected


def test_an_operand_that_does_not_fit_is_refused(device: str) -> None:
    a, indices = torch.ones(5, 6, device=device), torch.arange(9, device=device)
    plan = plan_outer(indices, 6, 6, 5, a.dtype, "compact")
    with pytest.raises(ValueError, match="the plan is for 6 x 6, but a and b have 6 and 5 columns"):
        outer.gather_outer(a, a[:, :5], indices, plan)
