"""`adapted_in_workspace` gives PEFT's dequantized weight plus the deltas."""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes as bnb
import pytest
import torch
from peft.utils.quantization_utils import resolve_quantization_backend
from support.quantized import (
    QUANTIZED,
    assert_holds_the_same,
    everything_held,
    linear_4bit,
    linear_8bit,
    quantized_on_cpu,
)
from support.tensors import OpRecorder, assert_same_bits
from torch import Tensor, nn

from spiel_kernels import apply_deltas, quantized
from spiel_kernels.workspace import release_workspaces, workspace, workspace_nbytes
from spiel_peft.weights.quantized import adapted_in_workspace

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Aligned, several blocks of rows, blocks of scales that straddle rows, odd widths, a byte with one element, one row.
SHAPES = [(64, 128), (50, 192), (9, 70), (6, 96), (7, 33), (1, 1), (1, 130), (3, 1)]
Delta = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def empty_workspaces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(quantized, "CPU_BLOCK_ELEMENTS", 1000)
    release_workspaces()
    yield
    release_workspaces()


def layer_4bit(shape: tuple[int, int], dtype: torch.dtype, **options: object) -> nn.Module:
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, compute_dtype=torch.float32, **options)
    return quantized_on_cpu(layer.to(dtype))


def layer_8bit(shape: tuple[int, int]) -> nn.Module:
    return bnb.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False).to("cpu")


def draw_deltas(numel: int, *counts: int) -> list[Delta]:
    return [(torch.randperm(numel)[:k].sort().values.int(), torch.randn(k)) for k in counts]


def by_peft(layer: nn.Module, deltas: list[Delta], dtype: torch.dtype) -> Tensor:
    """A copy of PEFT's dequantized weight with the deltas."""
    weight = resolve_quantization_backend(layer).get_base_weight(layer)
    return apply_deltas(weight, deltas, dtype) if deltas else weight.to(dtype)


def adapted_copy(layer: nn.Module, deltas: list[Delta], dtype: torch.dtype) -> Tensor:
    with adapted_in_workspace(layer, deltas, dtype) as weight:
        return weight.clone()


def check(layer: nn.Module, deltas: list[Delta], dtype: torch.dtype) -> None:
    held = everything_held(layer)
    with adapted_in_workspace(layer, deltas, dtype) as got:
        assert got is not None
        assert_holds_the_same(everything_held(layer), held)
        assert_same_bits(got, by_peft(layer, deltas, dtype))
        lent = got.untyped_storage().data_ptr()
    with workspace((1, 1), dtype, "cpu") as next_one:
        assert next_one.untyped_storage().data_ptr() == lent


# bitsandbytes takes a weight of one packed byte for a transposed one.
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != (1, 1)], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True], ids=["float-scales", "double"])
def test_4bit(shape: tuple[int, int], quant_type: str, double: bool) -> None:
    layer = layer_4bit(shape, torch.float32, quant_type=quant_type, compress_statistics=double)
    numel = shape[0] * shape[1]
    for count in (0, numel // 3, numel):
        check(layer, draw_deltas(numel, count), torch.float32)


@pytest.mark.parametrize("quant_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("compute_dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("counts", [(), (900,), (900, 0, 4000)], ids=str)
def test_4bit_dtypes_and_several_adapters(
    quant_dtype: torch.dtype, compute_dtype: torch.dtype, counts: tuple[int, ...]
) -> None:
    layer = layer_4bit((64, 128), quant_dtype)
    assert layer.weight.quant_state.dtype == quant_dtype
    check(layer, draw_deltas(64 * 128, *counts), compute_dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("compute_dtype", FLOATS, ids=str)
def test_8bit(shape: tuple[int, int], compute_dtype: torch.dtype) -> None:
    layer, numel = layer_8bit(shape), shape[0] * shape[1]
    for counts in ((0,), (numel // 2,), (numel, numel // 3)):
        check(layer, draw_deltas(numel, *counts), compute_dtype)


def test_8bit_before_and_after_the_first_forward() -> None:
    layer, deltas = linear_8bit(), draw_deltas(64 * 128, 500)
    assert layer.weight.SCB is not None and layer.state.SCB is None
    before = adapted_copy(layer, deltas, torch.float32)
    layer(torch.randn(2, 128))
    assert layer.weight.SCB is None and layer.state.SCB is not None
    check(layer, deltas, torch.float32)
    assert_same_bits(adapted_copy(layer, deltas, torch.float32), before)


@pytest.mark.parametrize("name", QUANTIZED)
def test_positions_of_64_bits_and_strided_deltas(name: str) -> None:
    layer = QUANTIZED[name]()
    numel = layer.in_features * layer.out_features
    indices, values = draw_deltas(numel, 700)[0]
    strided = torch.stack([indices, indices], 1).long()[:, 0], torch.stack([values, values], 1)[:, 0]
    assert not strided[0].is_contiguous()
    got = adapted_copy(layer, [strided], torch.float32)
    assert_same_bits(got, by_peft(layer, [(indices, values)], torch.float32))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_4bit_bytes_stored_as_another_dtype(storage: torch.dtype) -> None:
    layer = layer_4bit((64, 128), torch.bfloat16, quant_storage=storage)
    assert layer.weight.dtype == storage
    deltas, held = draw_deltas(64 * 128, 700), layer.weight.data.clone()
    got = adapted_copy(layer, deltas, torch.bfloat16)
    assert_same_bits(got, by_peft(layer, deltas, torch.bfloat16))
    assert_same_bits(layer.weight.data, held)  # as floats, some bytes are NaN


@pytest.mark.parametrize("blocksize", [32, 128, 1024])
def test_4bit_block_sizes(blocksize: int) -> None:
    layer = bnb.nn.Linear4bit(1024, 5, bias=False)
    layer.weight.blocksize = blocksize
    layer = quantized_on_cpu(layer)
    assert layer.weight.quant_state.blocksize == blocksize
    check(layer, draw_deltas(5 * 1024, 700), torch.float32)


@pytest.mark.parametrize("name", QUANTIZED)
def test_no_graph_is_kept(name: str) -> None:
    layer = QUANTIZED[name]()
    values = nn.Parameter(torch.randn(2))
    with adapted_in_workspace(layer, [(torch.tensor([3, 8]), values)], torch.float32) as got:
        assert not got.requires_grad
    with workspace((1, 1), torch.float32, "cpu") as next_one:
        assert not next_one.requires_grad


@pytest.mark.parametrize("name", QUANTIZED)
def test_works_in_inference_mode_and_after_it(name: str) -> None:
    layer, deltas = QUANTIZED[name](), draw_deltas(500, 100)
    with torch.inference_mode():
        inside = adapted_copy(layer, deltas, torch.float32)
    assert_same_bits(adapted_copy(layer, deltas, torch.float32), inside)


@pytest.mark.parametrize("name", ["nf4-double", "fp4", "8bit"])
def test_nothing_as_large_as_the_weight_is_made_besides_the_workspace(name: str) -> None:
    layer, deltas = QUANTIZED[name](), draw_deltas(64 * 128, 80)
    with adapted_in_workspace(layer, deltas, torch.bfloat16):
        pass
    held = workspace_nbytes()
    assert held == 64 * 128 * 2
    with OpRecorder() as recorder, adapted_in_workspace(layer, deltas, torch.bfloat16):
        pass
    assert recorder.largest <= 1024  # CPU_BLOCK_ELEMENTS in whole rows, or one row's worth more
    assert workspace_nbytes() == held


# Layers for which it gives None


def repacked() -> nn.Module:
    if not hasattr(bnb.functional, "_convert_weight_packed_for_cpu"):
        pytest.skip("this version of bitsandbytes does not repack weights for CPUs")
    layer = linear_4bit()
    layer.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    return layer


def transposed() -> nn.Module:
    layer = linear_4bit()
    layer.weight.data = layer.weight.data.T
    return layer


OTHERS = {
    "plain": lambda: nn.Linear(4, 4),
    "no weight": nn.Identity,
    "4bit-not-quantized": lambda: bnb.nn.Linear4bit(64, 64),
    "8bit-not-quantized": lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
    "8bit-training-in-half": lambda: bnb.nn.Linear8bitLt(64, 64).to("cpu"),
    "4bit-meta": lambda: bnb.nn.Linear4bit(64, 64, device="meta"),
    "4bit-repacked": repacked,
    "4bit-transposed": transposed,
    "4bit-embedding": lambda: quantized_on_cpu(bnb.nn.Embedding4bit(64, 64)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_are_left_alone(name: str) -> None:
    with adapted_in_workspace(OTHERS[name](), draw_deltas(16, 3), torch.float32) as got:
        assert got is None
    assert workspace_nbytes() == 0
