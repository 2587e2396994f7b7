"""Dequantize and fold, against a float64 oracle and, bit for bit, against the steps one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.tensors import assert_close, assert_same_bits
from torch import Tensor

from spiel_kernels import apply_deltas, quantized
from spiel_kernels.quantized import dequantize_fold_4bit, dequantize_fold_8bit
from spiel_kernels.quantized_layout import (
    CODES,
    Packed4bit,
    dequantize_4bit,
    dequantize_8bit,
    quantize_4bit,
    quantize_8bit,
)

from .oracle import adapted_weight, draw_deltas

SHAPES = [(1, 1), (1, 70), (33, 1), (7, 33), (40, 64), (3, 2048), (0, 4)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
Delta = tuple[Tensor, Tensor]


def unwritten(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix of NaNs, so that an entry left unwritten shows."""
    return torch.full(weight.shape, float("nan"), dtype=dtype)


class Case:
    """A quantized matrix, its dequantized values, and the operation that adds deltas to it."""

    def __init__(self, w0: Tensor, tensors: list[Tensor], fold: Callable[[list[Delta], Tensor], Tensor]) -> None:
        self.w0, self.tensors, self.fold = w0, tensors, fold


def case(kind: str, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Case:
    dense = torch.randn(shape).to(dtype)
    if kind == "8bit":
        codes, scales = quantize_8bit(dense)
        return Case(
            dequantize_8bit(codes, scales), [codes, scales], lambda d, out: dequantize_fold_8bit(codes, scales, d, out)
        )
    weight = quantize_4bit(dense, kind.removesuffix("-double"), nested=kind.endswith("double"))
    held = [weight.packed, weight.absmax]
    return Case(dequantize_4bit(weight), held, lambda d, out: dequantize_fold_4bit(weight, d, out))


KINDS = ["nf4", "nf4-double", "fp4-double", "8bit"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0], ids=["none", "some", "all"])
@pytest.mark.parametrize("out_dtype", [*FLOATS, torch.float64], ids=str)
def test_fold(kind: str, shape: tuple[int, int], share: float, out_dtype: torch.dtype) -> None:
    quantized_weight = case(kind, shape)
    w0 = quantized_weight.w0
    before = [tensor.clone() for tensor in quantized_weight.tensors]
    deltas = draw_deltas(w0.numel(), int(share * w0.numel()))
    out = unwritten(w0, out_dtype)
    assert quantized_weight.fold(deltas, out) is out
    assert_same_bits(out, apply_deltas(w0, deltas, out_dtype))
    tolerance = torch.finfo(torch.float32 if out_dtype == torch.float64 else out_dtype).eps
    assert_close(out, adapted_weight(w0, deltas), tolerance)
    for tensor, original in zip(quantized_weight.tensors, before, strict=True):
        assert_same_bits(tensor, original)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(), (5, 9), (0, 4), (231, 231), (2, 9, 100)], ids=str)
@pytest.mark.parametrize("quant_dtype, out_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_several_deltas_add_up_before_they_are_rounded(
    kind: str, counts: tuple[int, ...], quant_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    quantized_weight = case(kind, (7, 33), quant_dtype)
    w0, deltas = quantized_weight.w0, draw_deltas(231, *counts)
    out = quantized_weight.fold(deltas, unwritten(w0, out_dtype))
    expected = apply_deltas(w0, deltas, out_dtype) if deltas else w0.to(out_dtype)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_dtypes_and_strides_of_deltas(kind: str, dtype: torch.dtype) -> None:
    quantized_weight = case(kind, (7, 33))
    indices, values = draw_deltas(231, 50, dtype=dtype)[0]
    strided = (
        torch.stack([indices.long(), indices.long()], 1)[:, 0],
        torch.stack([values, values], 1)[:, 0],
    )
    assert not strided[0].is_contiguous()
    got = quantized_weight.fold([strided], unwritten(quantized_weight.w0, torch.float32))
    assert_same_bits(got, apply_deltas(quantized_weight.w0, [(indices, values)], torch.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("elements", [1, 100, 500])
def test_blocks_for_the_cache_change_nothing(kind: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized_weight = case(kind, (70, 33))
    deltas = draw_deltas(2310, 300, 7)
    expected = apply_deltas(quantized_weight.w0, deltas, torch.float32)
    monkeypatch.setattr(quantized, "CPU_BLOCK_ELEMENTS", elements)
    assert_same_bits(quantized_weight.fold(deltas, unwritten(quantized_weight.w0, torch.float32)), expected)


def test_positions_in_odd_columns_read_the_low_nibble() -> None:
    """The byte 0x1f holds code 1, then code 15."""
    packed = torch.tensor([0x1F], dtype=torch.uint8)
    weight = Packed4bit(packed, torch.tensor([2.0]), (1, 2), torch.float32)
    zero = (torch.tensor([1]), torch.zeros(1))
    out = dequantize_fold_4bit(weight, [zero], torch.empty(1, 2))
    assert_same_bits(out, 2 * torch.tensor([[CODES["nf4"][1], 1.0]]))


# Refusals


PLAIN = quantize_4bit(torch.ones(4, 100), nested=False)
INDICES, VALUES = torch.arange(3), torch.zeros(3)
BAD_FOLDS = [
    ("out must be a contiguous floating matrix", [], torch.zeros(100, 4).T),
    ("out must be a contiguous floating matrix, got torch.int64", [], torch.zeros(4, 100).long()),
    (r"one-dimensional and equally long, got shapes \(3,\) and \(2,\)", [(INDICES, VALUES[:2])], torch.zeros(4, 100)),
    ("indices must be int64, or int32 below 2\\*\\*31 elements", [(INDICES.short(), VALUES)], torch.zeros(4, 100)),
]


@pytest.mark.parametrize("message, deltas, out", BAD_FOLDS, ids=range(len(BAD_FOLDS)))
def test_folds_that_do_not_fit_are_refused(message: str, deltas: list[Delta], out: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        dequantize_fold_4bit(PLAIN, deltas, out)
    with pytest.raises(ValueError, match=message):
        dequantize_fold_8bit(torch.zeros(4, 100, dtype=torch.int8), torch.ones(4), deltas, out)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"out must have the weight's shape \(4, 100\), got \(100, 4\)"):
        dequantize_fold_4bit(PLAIN, [], torch.zeros(100, 4))
    with pytest.raises(ValueError, match=r"weight must be int8 of out's shape \(4, 100\), got torch.int8 of shape"):
        dequantize_fold_8bit(torch.zeros(4, 99, dtype=torch.int8), torch.ones(4), [], torch.zeros(4, 100))
    with pytest.raises(ValueError, match=r"scales must be float32 of shape \(4,\), got torch.float16"):
        dequantize_fold_8bit(torch.zeros(4, 100, dtype=torch.int8), torch.ones(4).half(), [], torch.zeros(4, 100))
    with pytest.raises(ValueError, match="every delta needs indices and values, got 1 and 0"):
        torch.ops.spiel_kernels.dequantize_fold_8bit(
            torch.zeros(4, 100, dtype=torch.int8), torch.ones(4), [INDICES], [], torch.zeros(4, 100)
        )


# torch.compile


def test_opcheck() -> None:
    weight = quantize_4bit(torch.randn(7, 33))
    nested, (indices, values) = weight.nested, draw_deltas(231, 40)[0]
    options = (nested.code, nested.absmax, nested.offset, nested.blocksize, "nf4", 64, torch.float32)
    torch.library.opcheck(
        torch.ops.spiel_kernels.dequantize_fold_4bit.default,
        (weight.packed, weight.absmax, *options, [indices], [values], torch.zeros(7, 33)),
    )
    torch.library.opcheck(
        torch.ops.spiel_kernels.dequantize_fold_8bit.default,
        (*quantize_8bit(torch.randn(7, 33)), [indices, indices], [values, values], torch.zeros(7, 33)),
    )


def test_compiles_without_graph_breaks() -> None:
    weight, deltas = quantize_4bit(torch.randn(7, 33)), draw_deltas(231, 40)
    codes = quantize_8bit(torch.randn(33, 7))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def product(x: Tensor, four: Tensor, eight: Tensor) -> Tensor:
        hidden = x @ dequantize_fold_4bit(weight, deltas, four)
        return hidden @ dequantize_fold_8bit(*codes, deltas, eight)

    x = torch.randn(2, 7)
    got = product(x, torch.zeros(7, 33), torch.zeros(33, 7))
    expected = x @ apply_deltas(dequantize_4bit(weight), deltas) @ apply_deltas(dequantize_8bit(*codes), deltas)
    assert_close(got, expected, 1e-5)
