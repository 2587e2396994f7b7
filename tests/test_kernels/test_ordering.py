"""`sorted_order` and `true_slots`, compared with PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spiel_kernels import sorted_order
from spiel_kernels.index_set import true_slots

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16]


def drawn(size: int, dtype: torch.dtype, distinct: int) -> Tensor:
    """Few distinct keys; floating ones include both zeros and both infinities."""
    keys = torch.randint(-distinct, distinct + 1, (size,)).to(torch.float64)
    if dtype.is_floating_point:
        keys = keys / 3
        keys[torch.rand(size) < 0.1] = -0.0
        keys[torch.rand(size) < 0.05] = torch.inf
        keys[torch.rand(size) < 0.05] = -torch.inf
    return keys.to(dtype)


@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 2, 1000])
@pytest.mark.parametrize("distinct", [0, 2, 300])
def test_order_is_that_of_a_stable_sort(size: int, dtype: torch.dtype, distinct: int, descending: bool) -> None:
    keys = drawn(size, dtype, distinct)
    before = keys.clone()
    expected = torch.sort(keys, stable=True, descending=descending).indices
    assert torch.equal(sorted_order(keys, descending=descending), expected)
    assert torch.equal(keys, before), "keys are left as they are"


@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize("far", [2**31 - 1, 2**31, 2**40, -(2**31), -(2**31) - 1])
def test_wide_integers(far: int, descending: bool) -> None:
    keys = torch.tensor([3, far, -5, 3, far, 0])
    expected = torch.sort(keys, stable=True, descending=descending).indices
    assert torch.equal(sorted_order(keys, descending=descending), expected)


def test_tensors_with_gradients_and_strides() -> None:
    keys = torch.randn(20, requires_grad=True)
    assert torch.equal(sorted_order(keys[::2]), torch.sort(keys[::2], stable=True).indices)


@pytest.mark.parametrize("size", [0, 1, 9, 1000])
def test_true_slots(size: int) -> None:
    mask = torch.rand(size) < 0.3
    got = true_slots(mask)
    assert got.dtype == torch.int64 and torch.equal(got, mask.nonzero().flatten())
    assert torch.equal(true_slots(mask[::2]), mask[::2].nonzero().flatten())
