"""The Triton kernel of `copy_fold` against plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from spiel_kernels import copy_fold
from spiel_kernels.dispatch import use_backend

from ..oracle import draw_indices

# The interpreter truncates float32 to bfloat16, where hardware rounds: results differ by one step of bfloat16.
DTYPES = [(torch.float32, 0.0), (torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)]


@pytest.mark.parametrize("dtype, tolerance", DTYPES, ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("numel, k", [(1, 0), (1, 1), (64, 64), (5000, 1), (5000, 1023), (5000, 1025), (3000, 3000)])
def test_copy_fold(
    numel: int,
    k: int,
    values_dtype: torch.dtype,
    index_dtype: torch.dtype,
    dtype: torch.dtype,
    tolerance: float,
    device: str,
) -> None:
    weight = torch.randn(numel).to(dtype).to(device)
    deltas = [(draw_indices(numel, k, index_dtype).to(device), torch.randn(k).to(values_dtype).to(device))]
    before = weight.clone()
    for out_dtype, allowed in ((dtype, tolerance), (torch.float32, tolerance), (torch.bfloat16, 2.0**-6)):
        outs = [torch.empty(numel, dtype=out_dtype, device=device) for _ in range(2)]
        with use_backend("torch"):
            copy_fold(weight, deltas, outs[0])
        with use_backend("triton"):
            copy_fold(weight, deltas, outs[1])
        torch.testing.assert_close(outs[1], outs[0], rtol=allowed, atol=0.0)
    assert torch.equal(weight, before)
