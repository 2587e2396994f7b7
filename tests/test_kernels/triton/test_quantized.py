"""The kernels that dequantize and fold, against the PyTorch implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spiel_kernels import apply_deltas
from spiel_kernels.dispatch import use_backend
from spiel_kernels.quantized import dequantize_fold_4bit, dequantize_fold_8bit
from spiel_kernels.quantized_layout import CODES, quantize_4bit, quantize_8bit

from ..oracle import draw_indices

# One element, one row, one column, odd sizes, a last byte with one element, several programs, no entries.
SHAPES = [(1, 1), (1, 70), (33, 1), (7, 33), (3, 2049), (40, 64), (0, 4)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
Delta = tuple[Tensor, Tensor]


def draw_deltas(numel: int, device: str, *counts: int, index: torch.dtype = torch.int32) -> list[Delta]:
    return [(draw_indices(numel, k, index).to(device), torch.randn(k, device=device)) for k in counts]


def assert_same(got: Tensor, expected: Tensor, quant_dtype: torch.dtype = torch.float32) -> None:
    """Asserts equal bits; allows one unit for each of two casts to bfloat16, which the interpreter truncates."""
    assert got.dtype == expected.dtype and got.shape == expected.shape and not got.isnan().any()
    truncated = [got.dtype, quant_dtype].count(torch.bfloat16) if got.device.type == "cpu" else 0
    if got.numel():
        assert (got.double() - expected.double()).abs().max() <= truncated * 2**-7 * expected.double().abs().max()


def both_4bit(weight: object, deltas: list[Delta], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    outs = []
    for backend in ("triton", "torch"):
        out = torch.full(weight.shape, float("nan"), dtype=dtype, device=weight.packed.device)
        with use_backend(backend):
            outs.append(dequantize_fold_4bit(weight, deltas, out))
    return outs[0], outs[1]


def both_8bit(codes: Tensor, scales: Tensor, deltas: list[Delta], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    outs = []
    for backend in ("triton", "torch"):
        out = torch.full(codes.shape, float("nan"), dtype=dtype, device=codes.device)
        with use_backend(backend):
            outs.append(dequantize_fold_8bit(codes, scales, deltas, out))
    return outs[0], outs[1]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0], ids=["none", "some", "all"])
@pytest.mark.parametrize("quant_type", CODES)
@pytest.mark.parametrize("nested", [False, True], ids=["float-scales", "double"])
def test_4bit(shape: tuple[int, int], share: float, quant_type: str, nested: bool, device: str) -> None:
    weight = quantize_4bit(torch.randn(shape, device=device), quant_type, nested=nested)
    deltas = draw_deltas(weight.numel, device, int(share * weight.numel))
    assert_same(*both_4bit(weight, deltas, torch.float32))


@pytest.mark.parametrize("quant_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("out_dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("values", [*FLOATS, torch.float64], ids=str)
def test_4bit_dtypes(quant_dtype: torch.dtype, out_dtype: torch.dtype, values: torch.dtype, device: str) -> None:
    weight = quantize_4bit(torch.randn(7, 33, device=device).to(quant_dtype))
    deltas = [(indices, v.to(values)) for indices, v in draw_deltas(231, device, 80)]
    assert_same(*both_4bit(weight, deltas, out_dtype), quant_dtype)


@pytest.mark.parametrize("blocksize", [32, 128, 2048, 4096])
def test_4bit_block_sizes(blocksize: int, device: str) -> None:
    weight = quantize_4bit(torch.randn(9, 1111, device=device), blocksize=blocksize)
    assert_same(*both_4bit(weight, draw_deltas(9999, device, 500), torch.float32))


def test_4bit_bytes_stored_as_bfloat16(device: str) -> None:
    weight = quantize_4bit(torch.randn(16, 64, device=device))
    stored = type(weight)(**{**vars(weight), "packed": weight.packed.view(torch.bfloat16)})
    deltas = draw_deltas(1024, device, 100)
    assert_same(both_4bit(stored, deltas, torch.float32)[0], both_4bit(weight, deltas, torch.float32)[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0], ids=["none", "some", "all"])
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
def test_8bit(shape: tuple[int, int], share: float, out_dtype: torch.dtype, device: str) -> None:
    codes, scales = quantize_8bit(torch.randn(shape, device=device))
    deltas = draw_deltas(codes.numel(), device, int(share * codes.numel()))
    assert_same(*both_8bit(codes, scales, deltas, out_dtype))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_all_deltas_in_one_run_and_strided(index: torch.dtype, device: str) -> None:
    """One program has more deltas than fit in one round, the others have none."""
    where = torch.arange(700, 1900, 2, device=device).to(index)
    values = torch.randn(where.numel(), 2, device=device)[:, 0]
    deltas = [(torch.stack([where, where], 1)[:, 1], values)]
    assert not deltas[0][0].is_contiguous() and not deltas[0][1].is_contiguous()
    weight = quantize_4bit(torch.randn(5, 2000, device=device))
    assert_same(*both_4bit(weight, deltas, torch.float32))
    assert_same(*both_8bit(*quantize_8bit(torch.randn(5, 2000, device=device)), deltas, torch.float32))


@pytest.mark.parametrize("counts", [(5, 9), (0, 4), (231, 231), (0, 0), (2, 9, 100)], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16], ids=str)
def test_several_deltas(counts: tuple[int, ...], out_dtype: torch.dtype, device: str) -> None:
    weight, deltas = quantize_4bit(torch.randn(7, 33, device=device)), draw_deltas(231, device, *counts)
    assert_same(*both_4bit(weight, deltas, out_dtype))
    assert_same(*both_8bit(*quantize_8bit(torch.randn(7, 33, device=device)), deltas, out_dtype))


def test_nothing_around_the_matrix_is_written(device: str) -> None:
    weight = quantize_4bit(torch.randn(7, 33, device=device))
    guarded = torch.full((300,), 7.0, device=device)
    with use_backend("triton"):
        dequantize_fold_4bit(weight, draw_deltas(231, device, 60), guarded[30:261].view(7, 33))
        assert (guarded[:30] == 7).all() and (guarded[261:] == 7).all()
        codes = quantize_8bit(torch.randn(7, 33, device=device))
        dequantize_fold_8bit(*codes, draw_deltas(231, device, 60), guarded[30:261].view(7, 33))
        assert (guarded[:30] == 7).all() and (guarded[261:] == 7).all()


@pytest.mark.parametrize("name", ["nf4", "nf4-double", "fp4-double", "8bit"])
@pytest.mark.parametrize("counts", [(), (0,), (600,), (600, 70)], ids=str)
def test_layers_of_bitsandbytes(name: str, counts: tuple[int, ...], device: str) -> None:
    """The function that layers call gives PEFT's dequantized weight plus the deltas."""
    pytest.importorskip("bitsandbytes")
    from peft.utils.quantization_utils import resolve_quantization_backend
    from support.quantized import QUANTIZED

    from spiel_peft.weights.quantized import adapted_in_workspace

    layer = QUANTIZED[name]().to(device)
    expected = resolve_quantization_backend(layer).get_base_weight(layer).clone()
    deltas = draw_deltas(expected.numel(), device, *counts)
    if deltas:
        expected = apply_deltas(expected, deltas)
    with use_backend("triton"), adapted_in_workspace(layer, deltas, torch.float32) as weight:
        assert_same(weight, expected)
