"""`gather_outer` and `topk_outer`, and their counterparts for dense gradients."""

from __future__ import annotations

import pytest
import torch
from support.tensors import OpRecorder, assert_close

from spiel_kernels import gather_dense, gather_outer, gather_outer_sets, topk_dense, topk_outer
from spiel_kernels.outer_plan import plan_for, plan_outer
from spiel_kernels.sampled import sampled_pays

from .oracle import DTYPE_IDS, DTYPES, draw_indices, outer_entries, small_integers, top_positions

SIZES = [(1, 1, 1), (3, 1, 7), (3, 7, 1), (0, 4, 5), (1, 3, 4), (6, 13, 5), (4, 5, 13)]


@pytest.mark.parametrize("dtype, tolerance", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("n, rows, cols", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0], ids=["none", "some", "all"])
def test_gather(n: int, rows: int, cols: int, share: float, dtype: torch.dtype, tolerance: float) -> None:
    a, b = torch.randn(n, rows).to(dtype), torch.randn(n, cols).to(dtype)
    indices = draw_indices(rows * cols, int(share * rows * cols), torch.int32)
    got = gather_outer(a, b, indices)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(got, outer_entries(a, b, indices), tolerance)


def test_gather_over_many_row_blocks() -> None:
    """More rows than one block takes; some blocks hold no position."""
    a, b = torch.randn(3, 1500, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    indices = torch.tensor([0, 1, 511, 512, 1024, 2050, 2998, 2999])
    assert_close(gather_outer(a, b, indices), outer_entries(a, b, indices), 1e-13)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_gather_takes_strided_operands_and_both_index_widths(index_dtype: torch.dtype) -> None:
    a, b = torch.randn(5, 8).T, torch.randn(16, 12)[::2, ::3]
    indices = draw_indices(5 * 4, 9, index_dtype)
    assert_close(gather_outer(a, b, indices), outer_entries(a, b, indices), 1e-5)


def test_mixed_dtypes_accumulate_in_the_wider_one() -> None:
    a, b = torch.randn(4, 3, dtype=torch.bfloat16), torch.randn(4, 3, dtype=torch.float64)
    got = gather_outer(a, b, torch.arange(9))
    assert got.dtype == torch.float64
    assert_close(got, outer_entries(a, b, torch.arange(9)), 1e-14)


@pytest.mark.parametrize("dtype", [d for d, _ in DTYPES], ids=DTYPE_IDS)
@pytest.mark.parametrize("n, rows, cols", SIZES)
@pytest.mark.parametrize("k", [0, 1, 4, 10**6], ids=["k0", "k1", "k4", "all"])
def test_topk_with_ties_and_zeros(n: int, rows: int, cols: int, k: int, dtype: torch.dtype) -> None:
    a, b = small_integers(n, rows).to(dtype), small_integers(n, cols).to(dtype)
    scores = outer_entries(a, b, torch.arange(rows * cols)).abs().tolist()
    got = topk_outer(a, b, k)
    assert got.dtype == torch.int64
    assert got.tolist() == top_positions(scores, k)


def test_topk_over_many_row_blocks() -> None:
    a, b = small_integers(3, 700), small_integers(3, 3)
    scores = (a.T @ b).abs().flatten().tolist()
    for k in (1, 50, 1999):
        assert topk_outer(a, b, k).tolist() == top_positions(scores, k)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [d for d, _ in DTYPES], ids=DTYPE_IDS)
def test_dense_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gradient = small_integers(*shape).to(dtype)
    flat = gradient.flatten().double()
    indices = draw_indices(flat.numel(), (flat.numel() + 1) // 2, torch.int32)
    got = gather_dense(gradient, indices)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.tolist() == flat[indices.long()].tolist()
    assert topk_dense(gradient, 2).tolist() == top_positions(flat.abs().tolist(), 2)


def test_dense_gradient_may_be_strided() -> None:
    gradient = torch.randn(4, 6).T
    indices = torch.tensor([0, 1, 5, 23])
    assert gather_dense(gradient, indices).tolist() == gradient.flatten()[indices].tolist()
    assert topk_dense(gradient, 3).tolist() == gradient.flatten().abs().topk(3).indices.sort().values.tolist()


@pytest.mark.parametrize("rows, cols, k", [(64, 48, 30), (64, 48, 2000), (300, 8, 300)])
def test_no_tensor_of_the_size_of_the_weight_is_formed(rows: int, cols: int, k: int) -> None:
    a, b = torch.randn(4, rows), torch.randn(4, cols)
    indices = draw_indices(rows * cols, k, torch.int32)
    with OpRecorder() as gathering:
        gather_outer(a, b, indices)
    with OpRecorder() as selecting:
        topk_outer(a, b, k)
    assert k <= gathering.largest < rows * cols
    assert k <= selecting.largest < rows * cols
    with OpRecorder() as dense:
        a.T @ b
    assert dense.largest == rows * cols, "the recorder must see what this test is about"


# Methods of gathering


@pytest.mark.parametrize("dtype, tolerance", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("method", ["sampled", "dense", "compact", "entries"])
@pytest.mark.parametrize("n, rows, cols", [*SIZES, (513, 5, 9), (256, 9, 5), (257, 70, 3)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0], ids=["none", "some", "all"])
def test_forced_methods(
    n: int, rows: int, cols: int, share: float, method: str, dtype: torch.dtype, tolerance: float
) -> None:
    a, b = torch.randn(n, rows).to(dtype), torch.randn(n, cols).to(dtype)
    indices = draw_indices(rows * cols, int(share * rows * cols), torch.int32)
    got = gather_outer(a, b, indices, method=method)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = (a.double().T @ b.double()).flatten()[indices.long()]
    assert_close(got, expected, tolerance)


@pytest.mark.parametrize("method", ["auto", "sampled", "dense"])
def test_several_index_sets_at_once(method: str) -> None:
    a, b = torch.randn(30, 40), torch.randn(30, 50)
    sets = [draw_indices(2000, k, torch.int32) for k in (0, 100, 2000, 1)]
    for indices, got in zip(sets, gather_outer_sets(a, b, sets, method), strict=True):
        if method != "auto":
            assert torch.equal(got, gather_outer(a, b, indices, method))
        assert_close(got, (a.double().T @ b.double()).flatten()[indices.long()], 1e-5)


def test_the_choice_depends_on_sizes_alone() -> None:
    assert sampled_pays(4096, 4096, 4096 * 4096 // 100)
    assert not sampled_pays(4096, 4096, 4096 * 4096)
    assert not sampled_pays(8, 8, 1)


def test_a_plan_is_made_once_per_index_set_and_again_when_it_changes() -> None:
    indices = draw_indices(600, 60)
    first = plan_for(indices, 20, 30, torch.float32, "compact")
    assert plan_for(indices, 20, 30, torch.float32, "compact") is first
    indices.copy_(draw_indices(600, 60))
    second = plan_for(indices, 20, 30, torch.float32, "compact")
    expected = plan_outer(indices, 20, 30, 2048, torch.float32, "compact")
    assert second is not first
    for got, wanted in zip(second.tensors, expected.tensors, strict=True):
        assert torch.equal(got, wanted)
    assert plan_for(indices, 30, 20, torch.float32, "compact").rows == 30


def test_wrong_operands_are_refused() -> None:
    a, b, indices = torch.randn(3, 4), torch.randn(3, 5), torch.arange(4)
    with pytest.raises(ValueError, match="method must be one of auto, ready, sampled, dense"):
        gather_outer(a, b, indices, method="fast")
    with pytest.raises(ValueError, match=r"a and b must be \[N, rows\] and \[N, cols\]"):
        gather_outer(a, torch.randn(4, 5), indices)
    with pytest.raises(ValueError, match="indices must be one-dimensional"):
        gather_outer(a, b, indices[None])


def test_gather_is_registered() -> None:
    torch.use_deterministic_algorithms(False)
    a, b, indices = torch.randn(3, 4), torch.randn(3, 5), torch.arange(0, 20, 3)
    torch.library.opcheck(torch.ops.spiel_kernels.gather_outer.default, (a, b, indices))
    expected = gather_outer(2 * a, b, indices)
    compiled = torch.compile(lambda a, b: gather_outer(2 * a, b, indices), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), expected)
