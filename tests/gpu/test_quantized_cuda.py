"""Dequantize and fold on a GPU: against PyTorch at the sizes of a 7B model, on streams, for bitsandbytes' layers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from spiel_kernels import apply_deltas
from spiel_kernels.dispatch import use_backend
from spiel_kernels.quantized import dequantize_fold_4bit, dequantize_fold_8bit
from spiel_kernels.quantized_layout import Packed4bit, dequantize_4bit, dequantize_8bit, quantize_4bit, quantize_8bit
from spiel_kernels.workspace import release_workspaces, workspace, workspace_nbytes

pytestmark = pytest.mark.gpu
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
Delta = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def empty_workspaces() -> Iterator[None]:
    release_workspaces()
    yield
    release_workspaces()


def draw_deltas(numel: int, *densities: float, index: torch.dtype = torch.int32) -> list[Delta]:
    deltas = []
    for density in densities:
        indices = (torch.rand(numel, device="cuda") < density).nonzero().flatten().to(index)
        deltas.append((indices, torch.randn(indices.numel(), device="cuda") * 0.01))
    return deltas


def unwritten(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")


@pytest.mark.parametrize("shape", [(4096, 11008), (4096, 4096), (1000, 4097)], ids=str)
@pytest.mark.parametrize("quant_type, nested", [("nf4", True), ("nf4", False), ("fp4", True)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_4bit_equals_pytorch(shape: tuple[int, int], quant_type: str, nested: bool, dtype: torch.dtype) -> None:
    weight = quantize_4bit(torch.randn(shape, device="cuda").to(dtype), quant_type, nested=nested)
    w0 = dequantize_4bit(weight)
    for deltas in (draw_deltas(weight.numel, 0.01), draw_deltas(weight.numel, 0.2, index=torch.int64), []):
        with use_backend("triton"):
            got = dequantize_fold_4bit(weight, deltas, unwritten(shape, dtype))
        assert torch.equal(got, apply_deltas(w0, deltas) if deltas else w0)


@pytest.mark.parametrize("quant_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("out_dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_4bit_dtypes_and_block_sizes(quant_dtype: torch.dtype, out_dtype: torch.dtype, blocksize: int) -> None:
    shape = (77, 1003)
    weight = quantize_4bit(torch.randn(shape, device="cuda").to(quant_dtype), blocksize=blocksize)
    for values in (*FLOATS, torch.float64):
        deltas = [(indices, v.to(values)) for indices, v in draw_deltas(weight.numel, 0.1)]
        with use_backend("triton"):
            got = dequantize_fold_4bit(weight, deltas, unwritten(shape, out_dtype))
        assert torch.equal(got, apply_deltas(dequantize_4bit(weight), deltas, out_dtype))


@pytest.mark.parametrize("shape", [(4096, 11008), (1000, 4097), (513, 1), (1, 65), (64, 100)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_8bit_equals_pytorch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes, scales = quantize_8bit(torch.randn(shape, device="cuda"))
    for deltas in (draw_deltas(codes.numel(), 0.01), draw_deltas(codes.numel(), 0.3, 0.1)):
        with use_backend("triton"):
            got = dequantize_fold_8bit(codes, scales, deltas, unwritten(shape, dtype))
        assert torch.equal(got, apply_deltas(dequantize_8bit(codes, scales), deltas, dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_several_deltas(dtype: torch.dtype) -> None:
    weight = quantize_4bit(torch.randn(300, 1024, device="cuda"))
    deltas = draw_deltas(weight.numel, 0.1, 0.0, 0.05)
    with use_backend("triton"):
        got = dequantize_fold_4bit(weight, deltas, unwritten(weight.shape, dtype))
    assert torch.equal(got, apply_deltas(dequantize_4bit(weight), deltas, dtype))


@pytest.mark.slow
def test_more_elements_than_31_bits_count() -> None:
    """The bytes are made up, as quantizing a matrix of this size takes too long; its beginning and end are compared."""
    rows, cols = 2**16, 2**15 + 64
    packed = torch.randint(256, (rows * cols // 2,), dtype=torch.uint8, device="cuda")
    weight = Packed4bit(packed, torch.rand(rows * cols // 64, device="cuda"), (rows, cols), torch.bfloat16)
    last = torch.arange(rows * cols - 1000, rows * cols, 3, device="cuda")
    indices = torch.cat([torch.arange(0, 1000, 3, device="cuda"), last])
    values = torch.randn(indices.numel(), device="cuda")
    with use_backend("triton"):
        got = dequantize_fold_4bit(weight, [(indices, values)], unwritten((rows, cols), torch.bfloat16))
    half, scales = 8 * cols // 2, 8 * cols // 64
    for end in (slice(None, 8), slice(-8, None)):
        packed_end = packed[:half] if end.start is None else packed[-half:]
        scales_end = weight.absmax[:scales] if end.start is None else weight.absmax[-scales:]
        first = 0 if end.start is None else (rows - 8) * cols
        inside = (indices >= first) & (indices < first + 8 * cols)
        part = Packed4bit(packed_end, scales_end, (8, cols), torch.bfloat16)
        expected = apply_deltas(dequantize_4bit(part), [(indices[inside] - first, values[inside])])
        assert torch.equal(got[end], expected)


def test_peak_memory_is_the_workspace() -> None:
    weight = quantize_4bit(torch.randn(4096, 4096, device="cuda").bfloat16())
    deltas = draw_deltas(weight.numel, 0.01)
    for _ in range(2):  # the first call makes the tables
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with workspace((4096, 4096), torch.bfloat16, "cuda") as out:
            dequantize_fold_4bit(weight, deltas, out)
    assert torch.cuda.max_memory_allocated() - before < 1 << 20
    assert workspace_nbytes("cuda") == 4096 * 4096 * 2


def test_workspaces_of_streams_are_apart() -> None:
    with workspace((4, 4), torch.float32, "cuda") as main:
        address = main.data_ptr()
    with workspace((4, 4), torch.float32, torch.device("cuda", 0)) as again:
        assert again.data_ptr() == address
    with torch.cuda.stream(torch.cuda.Stream()), workspace((4, 4), torch.float32, "cuda") as other:
        assert other.data_ptr() != address
    assert workspace_nbytes("cuda") == 2 * 64


def test_backward_reads_the_right_weight_again() -> None:
    """Autograd's own thread runs the backward pass on the stream of the forward pass, and so in the same workspace."""
    weights = [quantize_4bit(torch.randn(256, 256, device="cuda")) for _ in range(3)]
    deltas = [draw_deltas(256 * 256, 0.05) for _ in weights]

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, number: int) -> Tensor:
            ctx.number = number
            with workspace((256, 256), torch.float32, "cuda") as out:
                return x @ dequantize_fold_4bit(weights[number], deltas[number], out)

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
            with workspace((256, 256), torch.float32, "cuda") as out:
                return grad @ dequantize_fold_4bit(weights[ctx.number], deltas[ctx.number], out).T, None

    x = torch.randn(8, 256, device="cuda", requires_grad=True)
    out, dense = x, torch.eye(256, device="cuda", dtype=torch.float64)
    for number, (weight, delta) in enumerate(zip(weights, deltas, strict=True)):
        out = Layer.apply(out, number)
        dense = dense @ apply_deltas(dequantize_4bit(weight), delta).double()
    out.sum().backward()
    expected = (torch.ones_like(out, dtype=torch.float64) @ dense.T).float()
    assert (x.grad - expected).norm() <= 1e-2 * expected.norm()  # TF32 may be on


@pytest.mark.parametrize("double", [False, True], ids=["float-scales", "double"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_4bit_layers_of_bitsandbytes(double: bool, quant_type: str, dtype: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from spiel_peft.weights.quantized import adapted_in_workspace

    layer = bnb.nn.Linear4bit(704, 333, bias=False, quant_type=quant_type, compress_statistics=double)
    layer = layer.to(dtype).to("cuda")
    packed = layer.weight.data.clone()
    deltas = draw_deltas(704 * 333, 0.02)
    expected = apply_deltas(bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state), deltas, dtype)
    with adapted_in_workspace(layer, deltas, dtype) as weight:
        assert torch.equal(weight, expected)
    assert torch.equal(layer.weight.data, packed)


def test_8bit_layers_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from spiel_peft.weights.quantized import adapted_in_workspace

    layer = bnb.nn.Linear8bitLt(704, 333, bias=False, has_fp16_weights=False).to("cuda")
    deltas = draw_deltas(704 * 333, 0.02)
    for _ in range(2):
        scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
        w0 = bnb.functional.int8_vectorwise_dequant(layer.weight.data, scales)
        with adapted_in_workspace(layer, deltas, torch.bfloat16) as got:
            assert torch.equal(got, apply_deltas(w0, deltas, torch.bfloat16))
        layer(torch.randn(2, 704, device="cuda", dtype=torch.float16))
