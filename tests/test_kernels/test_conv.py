"""`gather_conv` and `topk_conv` against autograd through `F.conv*d`."""

from __future__ import annotations

import pytest
import torch
from support.tensors import OpRecorder, assert_close
from torch import Tensor
from torch.nn import functional as F

from spiel_kernels import gather_conv, topk_conv
from spiel_kernels.gather import ConvGeometry

from .oracle import DTYPE_IDS, DTYPES, draw_indices, top_positions

# weight shape [out, in / groups, *kernel], stride, padding, dilation, groups, input size
GEOMETRIES = {
    "1d": (ConvGeometry((5, 3, 2), (1,), (0,), (1,), 1), (7,)),
    "1d-padded-strided": (ConvGeometry((4, 2, 3), (2,), (2,), (1,), 1), (8,)),
    "1d-depthwise": (ConvGeometry((6, 1, 3), (1,), (1,), (2,), 3), (9,)),
    "2d": (ConvGeometry((8, 3, 3, 2), (1, 1), (0, 0), (1, 1), 1), (6, 5)),
    "2d-everything": (ConvGeometry((6, 2, 2, 3), (2, 1), (1, 2), (1, 2), 2), (7, 6)),
    "2d-one-by-one": (ConvGeometry((4, 3, 1, 1), (1, 1), (0, 0), (1, 1), 1), (3, 3)),
    "2d-one-filter": (ConvGeometry((1, 2, 3, 3), (3, 3), (1, 1), (1, 1), 1), (7, 7)),
    "3d": (ConvGeometry((4, 2, 2, 1, 2), (1, 2, 1), (1, 0, 1), (1, 1, 1), 1), (3, 4, 3)),
    "3d-groups": (ConvGeometry((4, 1, 2, 2, 2), (1, 1, 1), (0, 0, 0), (2, 1, 1), 4), (4, 3, 3)),
}
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def run(geometry: ConvGeometry, x: Tensor, weight: Tensor) -> Tensor:
    convolution = CONVOLUTIONS[len(geometry.stride)]
    return convolution(x, weight, None, geometry.stride, geometry.padding, geometry.dilation, groups=geometry.groups)


def draw(
    geometry: ConvGeometry, size: tuple[int, ...], batch: int = 2, integers: bool = False
) -> tuple[Tensor, Tensor]:
    """An output gradient and an input; with `integers`, small integers, whose sums are exact and tie often."""
    x = torch.randn(batch, geometry.weight_shape[1] * geometry.groups, *size)
    grad_out = torch.randn(run(geometry, x, torch.zeros(geometry.weight_shape)).shape)
    return (grad_out.round(), x.round()) if integers else (grad_out, x)


def dense_gradient(grad_out: Tensor, x: Tensor, geometry: ConvGeometry) -> Tensor:
    weight = torch.zeros(geometry.weight_shape, dtype=torch.float64, requires_grad=True)
    run(geometry, x.double(), weight).backward(grad_out.double())
    return weight.grad.flatten()


@pytest.mark.parametrize("geometry, size", GEOMETRIES.values(), ids=GEOMETRIES)
def test_gather_equals_autograd(geometry: ConvGeometry, size: tuple[int, ...]) -> None:
    grad_out, x = draw(geometry, size)
    expected = dense_gradient(grad_out, x, geometry)
    for k in (0, 1, expected.numel() // 2, expected.numel()):
        indices = draw_indices(expected.numel(), k, torch.int32)
        got = gather_conv(grad_out, x, geometry, indices)
        assert got.dtype == torch.float32
        # The error is relative to the whole gradient, as cancellation may leave a single entry small.
        assert (got - expected[indices.long()]).abs().sum() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("geometry, size", GEOMETRIES.values(), ids=GEOMETRIES)
def test_topk_equals_autograd(geometry: ConvGeometry, size: tuple[int, ...]) -> None:
    grad_out, x = draw(geometry, size, integers=True)
    scores = dense_gradient(grad_out, x, geometry).abs().tolist()
    for k in (0, 1, 7, 10**6):
        assert topk_conv(grad_out, x, geometry, k).tolist() == top_positions(scores, k)


@pytest.mark.parametrize("dtype, tolerance", DTYPES, ids=DTYPE_IDS)
def test_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    geometry, size = GEOMETRIES["2d-everything"]
    grad_out, x = (t.to(dtype) for t in draw(geometry, size))
    got = gather_conv(grad_out, x, geometry, torch.arange(72))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(got, dense_gradient(grad_out, x, geometry), tolerance)


def test_empty_batch() -> None:
    geometry, size = GEOMETRIES["2d"]
    grad_out, x = draw(geometry, size, batch=0)
    assert gather_conv(grad_out, x, geometry, torch.arange(5)).tolist() == [0.0] * 5
    assert topk_conv(grad_out, x, geometry, 3).tolist() == []


def test_strided_operands() -> None:
    geometry, size = GEOMETRIES["2d"]
    grad_out, x = draw(geometry, size)
    expected = dense_gradient(grad_out, x, geometry)
    grad_out, x = grad_out.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)
    assert not grad_out.is_contiguous() and not x.is_contiguous()
    assert_close(gather_conv(grad_out, x, geometry, torch.arange(expected.numel())), expected, 1e-5)


def test_no_tensor_of_the_size_of_the_weight_is_formed() -> None:
    geometry = ConvGeometry((64, 32, 3, 3), (1, 1), (0, 0), (1, 1), 1)
    numel = geometry.rows * geometry.cols
    grad_out, x = draw(geometry, (4, 4), batch=1)
    indices = draw_indices(numel, 100)
    with OpRecorder() as recorder:
        gather_conv(grad_out, x, geometry, indices)
        topk_conv(grad_out, x, geometry, 100)
    assert 0 < recorder.largest < numel
