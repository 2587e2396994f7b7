"""`fold_`, `refold_` and `unfold_`: in place, exact, and registered for torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spiel_kernels import apply_deltas, fold_, refold_, unfold_

from .oracle import DTYPE_IDS, DTYPES, draw_indices

SHAPES = [(1, 1), (1, 9), (9, 1), (7, 13), (3, 2, 2, 2)]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("dtype", [d for d, _ in DTYPES], ids=DTYPE_IDS)
@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0], ids=["none", "some", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_and_out(
    shape: tuple[int, ...], share: float, index_dtype: torch.dtype, values_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(dtype)
    original = weight.clone()
    numel = weight.numel()
    indices = draw_indices(numel, int(share * numel), index_dtype)
    first, second = (torch.randn(indices.numel()).to(values_dtype) for _ in range(2))
    kept = fold_(weight, indices, first)
    assert kept.dtype == dtype
    assert torch.equal(kept, original.take(indices.long()))
    assert torch.equal(weight, apply_deltas(original, [(indices, first)]))
    refold_(weight, indices, second, kept)
    assert torch.equal(weight, apply_deltas(original, [(indices, second)]))
    unfold_(weight, indices, kept)
    assert torch.equal(bits(weight), bits(original))


def test_strided_weights_and_values() -> None:
    storage = torch.randn(20, 14)
    weight = storage[::2, ::2].T
    before = storage.clone()
    indices, values = draw_indices(70, 20), torch.randn(40)[::2]
    expected = apply_deltas(weight, [(indices, values)])
    kept = fold_(weight, indices, values)
    assert torch.equal(weight, expected)
    unfold_(weight, indices, kept)
    assert torch.equal(storage, before)


def test_thousands_of_rewrites_leave_no_drift() -> None:
    weight = torch.randn(50, 40).bfloat16()
    original = weight.clone()
    indices = draw_indices(2000, 300)
    kept = fold_(weight, indices, torch.randn(300))
    for _ in range(2000):
        refold_(weight, indices, torch.randn(300), kept)
    unfold_(weight, indices, kept)
    assert torch.equal(bits(weight), bits(original))


def test_nan_and_infinity_come_back_as_they_were() -> None:
    weight = torch.tensor([float("nan"), float("inf"), -0.0, 1.0])
    original = weight.clone()
    indices = torch.arange(4)
    kept = fold_(weight, indices, torch.ones(4))
    unfold_(weight, indices, kept)
    assert torch.equal(bits(weight), bits(original))


def operands() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(6, 5), draw_indices(30, 7, torch.int32), torch.randn(7)


def test_registered() -> None:
    torch.use_deterministic_algorithms(False)
    weight, indices, values = operands()
    ops = torch.ops.spiel_kernels
    torch.library.opcheck(ops.fold_.default, (weight, indices, values))
    kept = weight.take(indices.long())
    torch.library.opcheck(ops.refold_.default, (weight, indices, values, kept))
    torch.library.opcheck(ops.unfold_.default, (weight, indices, kept))


def test_compiles_without_graph_breaks() -> None:
    torch.use_deterministic_algorithms(False)
    weight, indices, values = operands()
    original = weight.clone()

    def product(weight: Tensor, x: Tensor) -> Tensor:
        kept = fold_(weight, indices, values)
        out = x @ weight.T
        unfold_(weight, indices, kept)
        return out

    x = torch.randn(3, 5)
    expected = x @ apply_deltas(original, [(indices, values)]).T
    got = torch.compile(product, fullgraph=True, backend="aot_eager")(weight, x)
    torch.testing.assert_close(got, expected)
    assert torch.equal(weight, original)
