"""`adapted_entries`, `apply_deltas` and `copy_fold` sum in float32 (float64 if an operand has it) and round once."""

from __future__ import annotations

import pytest
import torch
from support.tensors import assert_close, assert_same_bits
from torch import Tensor

from spiel_kernels import adapted_entries, apply_deltas, copy_fold

from .oracle import DTYPE_IDS, DTYPES, adapted_weight, draw_deltas

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 6), (3, 2, 2, 3)]


@pytest.mark.parametrize("dtype", [d for d, _ in DTYPES], ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0], ids=["none", "some", "all"])
def test_one_delta(shape: tuple[int, ...], share: float, dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    deltas = draw_deltas(weight.numel(), int(share * weight.numel()))
    expected = adapted_weight(weight, deltas)
    got = apply_deltas(weight, deltas)
    assert got.dtype == dtype
    assert_close(got, expected, torch.finfo(dtype).eps)
    untouched = torch.ones(weight.numel(), dtype=torch.bool)
    untouched[deltas[0][0].long()] = False
    assert_same_bits(got.flatten()[untouched], weight.flatten()[untouched])


@pytest.mark.parametrize("counts", [(3, 5), (0, 4), (30, 30), (0, 0), (2, 9, 30)], ids=str)
def test_several_deltas_add_up_where_they_meet(counts: tuple[int, ...]) -> None:
    weight = torch.randn(5, 6)
    deltas = draw_deltas(30, *counts)
    assert_close(apply_deltas(weight, deltas), adapted_weight(weight, deltas), 1e-6)
    positions, sums = adapted_entries(weight, deltas)
    union = sorted({p for indices, _ in deltas for p in indices.tolist()})
    assert positions.dtype == torch.int64 and positions.tolist() == union
    assert sums.dtype == torch.float32


def test_sum_is_rounded_once() -> None:
    """1 + 3 * 2**-10 in bf16 steps stays 1 at each step; the exact sum rounds up."""
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    small = torch.full((1,), 3 * 2**-10, dtype=torch.bfloat16)
    zero = torch.zeros(1, dtype=torch.int32)
    assert float(weight + small) == 1.0
    assert float(apply_deltas(weight, [(zero, small), (zero, small)])) == 1 + 2**-7


def test_float64_anywhere_makes_float64_sums() -> None:
    index = torch.zeros(1, dtype=torch.int64)
    wide, narrow = torch.ones(1, dtype=torch.float64), torch.ones(1)
    assert adapted_entries(torch.ones(2, 2), [(index, narrow)])[1].dtype == torch.float32
    assert adapted_entries(torch.ones(2, 2), [(index, wide)])[1].dtype == torch.float64
    assert adapted_entries(torch.ones(2, 2).double(), [(index, narrow), (index, narrow)])[1].dtype == torch.float64


@pytest.mark.parametrize("strided", ["transposed", "sliced"])
def test_strided_weight_is_read_in_logical_order(strided: str) -> None:
    weight = torch.randn(6, 5).T if strided == "transposed" else torch.randn(10, 12)[::2, ::2]
    assert not weight.is_contiguous()
    deltas = draw_deltas(30, 8)
    before = weight.clone()
    assert_close(apply_deltas(weight, deltas), adapted_weight(weight, deltas), 1e-6)
    assert_close(apply_deltas(weight, deltas * 2), adapted_weight(weight, deltas * 2), 1e-6)
    assert_same_bits(weight, before)


def test_out_dtype_rounds_sums_and_untouched_entries() -> None:
    weight = torch.randn(4, 4)
    deltas = draw_deltas(16, 3)
    got = apply_deltas(weight, deltas, torch.bfloat16)
    assert_same_bits(got, apply_deltas(weight, deltas).to(torch.bfloat16))


def test_result_shares_no_memory_with_the_weight() -> None:
    weight = torch.zeros(2, 2)
    empty = (torch.empty(0, dtype=torch.int32), torch.empty(0))
    apply_deltas(weight, [empty]).fill_(1)
    assert not weight.any()


@pytest.mark.parametrize("dtype", [dtype for dtype, *_ in DTYPES], ids=DTYPE_IDS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [(), (0,), (30,), (77,), (30, 20)], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "transposed"])
def test_copy_fold_is_apply_deltas_into_memory_that_is_there(
    dtype: torch.dtype, out_dtype: torch.dtype, counts: tuple[int, ...], strided: bool
) -> None:
    weight = torch.randn(7, 11).to(dtype)
    if strided:
        weight = weight.t().contiguous().t()
    weight[0, 0], weight[1, 1] = float("nan"), -0.0
    deltas = draw_deltas(77, *counts)
    before, out = weight.clone(), torch.empty(7, 11, dtype=out_dtype)
    expected = (apply_deltas(weight, deltas) if deltas else weight).to(out_dtype)
    assert copy_fold(weight, deltas, out) is out
    # The bits of NaN after a cast depend on the strides.
    torch.testing.assert_close(out, expected, rtol=0.0, atol=0.0, equal_nan=True)
    assert_same_bits(weight, before)


def test_copy_fold_refuses_what_does_not_fit() -> None:
    weight = torch.randn(4, 5)
    for out in (torch.empty(5, 4), torch.empty(5, 4).t()):
        with pytest.raises(ValueError, match=r"out must be contiguous and have the weight's shape \(4, 5\)"):
            copy_fold(weight, draw_deltas(20, 3), out)


def test_copy_fold_is_registered() -> None:
    torch.use_deterministic_algorithms(False)
    ((indices, values),) = draw_deltas(20, 3)
    arguments = (torch.randn(4, 5), [indices], [values], torch.zeros(4, 5))
    torch.library.opcheck(torch.ops.spiel_kernels.copy_fold.default, arguments)


def test_copy_fold_compiles_without_graph_breaks() -> None:
    torch.use_deterministic_algorithms(False)
    weight, deltas = torch.randn(4, 5), draw_deltas(20, 3)

    def product(weight: Tensor, x: Tensor) -> Tensor:
        return x @ copy_fold(weight, deltas, torch.empty(4, 5)).T

    x = torch.randn(3, 5)
    got = torch.compile(product, fullgraph=True, backend="aot_eager")(weight, x)
    torch.testing.assert_close(got, x @ apply_deltas(weight, deltas).T)


def test_these_tests_run_with_empty_tensors_full_of_nan() -> None:
    """Checks the fixture of this folder: an entry that a kernel leaves unwritten is NaN."""
    assert torch.empty(3).isnan().all()
