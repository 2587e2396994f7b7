"""The Triton kernels of folding against plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from spiel_kernels import fold_, refold_, unfold_
from spiel_kernels.dispatch import use_backend

from ..oracle import draw_indices

# The interpreter cuts float32 to bfloat16 where hardware rounds: one step of bfloat16.
DTYPES = [(torch.float32, 0.0), (torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)]


@pytest.mark.parametrize("dtype, tolerance", DTYPES, ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("numel, k", [(1, 0), (1, 1), (64, 64), (5000, 1), (5000, 1023), (5000, 1025), (3000, 3000)])
def test_in_and_out(
    numel: int,
    k: int,
    values_dtype: torch.dtype,
    index_dtype: torch.dtype,
    dtype: torch.dtype,
    tolerance: float,
    device: str,
) -> None:
    weight = torch.randn(numel).to(dtype).to(device)
    indices = draw_indices(numel, k, index_dtype).to(device)
    first, second = (torch.randn(k).to(values_dtype).to(device) for _ in range(2))
    original, expected = weight.clone(), weight.clone()
    with use_backend("torch"):
        expected_kept = fold_(expected, indices, first)
    with use_backend("triton"):
        kept = fold_(weight, indices, first)
    assert torch.equal(kept, expected_kept)
    torch.testing.assert_close(weight, expected, rtol=tolerance, atol=0.0)
    with use_backend("torch"):
        refold_(expected, indices, second, expected_kept)
    with use_backend("triton"):
        refold_(weight, indices, second, kept)
    torch.testing.assert_close(weight, expected, rtol=tolerance, atol=0.0)
    with use_backend("triton"):
        unfold_(weight, indices, kept)
    assert torch.equal(weight, original)
