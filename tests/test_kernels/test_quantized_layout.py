"""Dequantized weights have the bits that bitsandbytes gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tensors import assert_same_bits
from torch import Tensor

from spiel_kernels.quantized_layout import (
    CODES,
    NestedScales,
    Packed4bit,
    block_scales,
    dequantize_4bit,
    dequantize_8bit,
    dequantize_entries_4bit,
    dequantize_entries_8bit,
    quantize_4bit,
    quantize_8bit,
)

from .oracle import draw_indices

SHAPES = [(1, 1), (1, 70), (33, 1), (7, 33), (40, 64)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def packed_by_bitsandbytes(
    shape: tuple[int, int], dtype: torch.dtype, storage: torch.dtype = torch.uint8, **options: object
) -> tuple[Packed4bit, Tensor]:
    """A random matrix that bitsandbytes has quantized, and its dequantized values from bitsandbytes."""
    functional = pytest.importorskip("bitsandbytes.functional")
    bytes_, state = functional.quantize_4bit(torch.randn(shape).to(dtype), quant_storage=storage, **options)
    nested = None
    if state.nested:
        nested = NestedScales(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    weight = Packed4bit(bytes_, state.absmax, shape, dtype, state.quant_type, state.blocksize, nested)
    return weight, functional.dequantize_4bit(bytes_, state)


# Without widths that are a multiple of 32 but not of the block size: bitsandbytes misreads these on some CPUs.
@pytest.mark.parametrize("shape", [(40, 64), (7, 33), (9, 70), (2, 4096), (65, 65), (3, 6)], ids=str)
@pytest.mark.parametrize("quant_type", CODES)
@pytest.mark.parametrize("double", [False, True], ids=["float-scales", "double"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_4bit_is_what_bitsandbytes_gives(
    shape: tuple[int, int], quant_type: str, double: bool, dtype: torch.dtype
) -> None:
    weight, expected = packed_by_bitsandbytes(shape, dtype, quant_type=quant_type, compress_statistics=double)
    got = dequantize_4bit(weight)
    assert got.dtype == dtype and torch.equal(got, expected)


@pytest.mark.parametrize("blocksize", [32, 128, 1024, 4096])
@pytest.mark.parametrize("quant_type", CODES)
def test_4bit_block_sizes(blocksize: int, quant_type: str) -> None:
    weight, expected = packed_by_bitsandbytes(
        (3, 4096), torch.float32, blocksize=blocksize, quant_type=quant_type, compress_statistics=True
    )
    assert torch.equal(dequantize_4bit(weight), expected)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_4bit_bytes_stored_as_another_dtype(storage: torch.dtype) -> None:
    weight, expected = packed_by_bitsandbytes((16, 64), torch.bfloat16, storage, compress_statistics=True)
    assert weight.packed.dtype == storage
    assert torch.equal(dequantize_4bit(weight), expected)


def test_double_quantized_scales_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight, _ = packed_by_bitsandbytes((128, 1024), torch.float32, compress_statistics=True)
    state = functional.QuantState(weight.nested.absmax, code=weight.nested.code, blocksize=256, dtype=torch.float32)
    expected = functional.dequantize_blockwise(weight.absmax, state) + weight.nested.offset
    assert_same_bits(block_scales(weight), expected)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (64, 32)], ids=str)
def test_8bit_is_what_peft_gives(shape: tuple[int, int]) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from peft.utils.integrations import dequantize_bnb_weight

    layer = bnb.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False).to("cpu")
    expected = dequantize_bnb_weight(layer.weight, layer.state)
    assert_same_bits(dequantize_8bit(layer.weight.data, layer.weight.SCB), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["float-scales", "double"])
def test_single_entries_are_those_of_the_whole(shape: tuple[int, int], nested: bool) -> None:
    dense = torch.randn(shape).bfloat16()
    weight = quantize_4bit(dense, nested=nested)
    positions = draw_indices(dense.numel(), max(1, dense.numel() // 2), torch.int32)
    assert_same_bits(dequantize_entries_4bit(weight, positions), dequantize_4bit(weight).take(positions.long()))
    codes, scales = quantize_8bit(dense)
    assert_same_bits(
        dequantize_entries_8bit(codes, scales, positions), dequantize_8bit(codes, scales).take(positions.long())
    )


@pytest.mark.parametrize("quant_type, error", [("nf4", 0.10), ("fp4", 0.13)])
@pytest.mark.parametrize("nested", [False, True], ids=["float-scales", "double"])
def test_quantizer_is_as_good_as_that_of_bitsandbytes(quant_type: str, error: float, nested: bool) -> None:
    dense = torch.randn(64, 257)
    got = dequantize_4bit(quantize_4bit(dense, quant_type, nested=nested))
    assert (got - dense).norm() < error * dense.norm()


def test_quantizer_takes_blocks_of_zeros() -> None:
    dense = torch.zeros(4, 96)
    assert not dequantize_4bit(quantize_4bit(dense)).any()
    assert not dequantize_8bit(*quantize_8bit(dense)).any()


def test_quantizer_refuses_other_types() -> None:
    with pytest.raises(ValueError, match="quant_type must be one of nf4, fp4, got 'int4'"):
        quantize_4bit(torch.zeros(2, 2), "int4")


def layout(**changes: object) -> Packed4bit:
    return replace(quantize_4bit(torch.randn(4, 100), nested=False), **changes)


NESTED = quantize_4bit(torch.randn(4, 100)).nested
BAD_LAYOUTS = {
    "quant_type must be one of nf4, fp4, got 'int4'": {"quant_type": "int4"},
    "blocksize must be one of 32, .*, 4096, got 48": {"blocksize": 48},
    "dtype must be float32, bfloat16 or float16, got torch.float64": {"dtype": torch.float64},
    r"packed must hold 200 contiguous bytes for shape \(4, 100\), got 100": {"packed": torch.zeros(100).byte()},
    "packed must hold 200 contiguous bytes .* strides": {"packed": torch.zeros(400).byte()[::2]},
    r"absmax must be torch.float32 of shape \(7,\), got torch.float32 of shape \(6,\)": {"absmax": torch.zeros(6)},
    "absmax must be torch.uint8 .* got torch.float32": {"nested": NESTED},
    r"nested code, absmax and offset must be float32 with \(256, 1, 1\) elements, got \(255, 1, 1\)": {
        "absmax": torch.zeros(7).byte(),
        "nested": replace(NESTED, code=torch.zeros(255)),
    },
}


@pytest.mark.parametrize("message, changes", BAD_LAYOUTS.items(), ids=range(len(BAD_LAYOUTS)))
def test_layouts_that_do_not_fit_are_refused(message: str, changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=message):
        layout(**changes)
