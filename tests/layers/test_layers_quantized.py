"""bitsandbytes layers: forward and gradients against the dequantized weight; the packed bytes never change."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator

import bitsandbytes as bnb
import pytest
import torch
from peft import get_peft_model
from support.layers import Single, adapt, dense_formula, spiel_layer, values_of
from support.quantized import (
    BITSANDBYTES_NEEDS_GPU,
    COLS,
    QUANTIZED,
    assert_holds_the_same,
    dequantized,
    everything_held,
    linear_4bit,
    linear_8bit,
    needs_bitsandbytes_050,
)
from support.tensors import assert_close, assert_same_bits
from torch import nn

from spiel_peft import SpIELConfig


@pytest.fixture(autouse=True)
def no_merge_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Merging a SpIEL adapter|Quantization lost")
        yield


every_kind = pytest.mark.parametrize("make", QUANTIZED.values(), ids=QUANTIZED)


@every_kind
@pytest.mark.parametrize("adapters", [("a",), ("a", "b")], ids=["one", "two"])
def test_forward_and_gradients(make: Callable[[], nn.Module], adapters: tuple[str, ...]) -> None:
    layer = make()
    weight = dequantized(layer)
    reference = nn.Linear(COLS, layer.out_features).double()
    reference.bias.data.copy_(layer.bias)
    model = adapt(layer, 500, adapters)
    layer.bias.requires_grad_()
    x = torch.randn(3, 4, COLS, requires_grad=True)
    out = model(x)
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    expected = dense_formula(spiel_layer(model), reference, weight, x, grad_out, adapters)
    half = getattr(layer, "compute_dtype", None) == torch.bfloat16
    tolerance = 8 * torch.finfo(torch.bfloat16).eps if half else 1e-5
    assert out.dtype == x.dtype
    assert_close(out, expected.out, tolerance, "output")
    assert_close(x.grad, expected.grad_input, tolerance, "input gradient")
    assert_close(layer.bias.grad, expected.grad_bias, tolerance, "bias gradient")
    for name in adapters:
        assert_close(values_of(model, name).grad, expected.grad_values[name], tolerance, name)


@every_kind
def test_evaluation_never_changes_what_is_read(make: Callable[[], nn.Module]) -> None:
    """bitsandbytes does not repack the bytes for CPUs with AVX512-BF16, which PEFT could not dequantize."""
    layer, x = make(), torch.randn(3, COLS)
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = True  # as on such CPUs
    model = adapt(layer, 500).eval()
    held = everything_held(layer)["bytes"]
    with torch.no_grad():
        expected = model(x)
        with model.disable_adapter():
            disabled = model(x)
        assert_same_bits(model(x), expected)
        assert_same_bits(layer.weight.data, held)
        # The 8-bit kernel of bitsandbytes rounds the input too.
        tolerance = 1e-5 if layer.weight.dtype == torch.uint8 and layer.compute_dtype != torch.bfloat16 else 2e-2
        assert_close(disabled, x @ dequantized(layer).T + layer.bias, tolerance)


@needs_bitsandbytes_050
@pytest.mark.parametrize("name", ["nf4", "nf4-double", "fp4", "fp4-double", "nf4-bf16"])
def test_weight_repacked_by_an_earlier_evaluation_is_read_rightly(name: str) -> None:
    """Undoing a repacking loses nothing beyond the scales' rounding to bfloat16, which repacking did."""
    layer = QUANTIZED[name]()
    weight = dequantized(layer).float()
    layer.weight.data, state = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    assert state.packing_format_for_cpu and layer.weight.quant_state is state
    wrapped = spiel_layer(adapt(layer, 500))
    assert_close(wrapped.get_base_weight().float(), weight, torch.finfo(torch.bfloat16).eps)
    x = torch.randn(3, COLS)
    with torch.no_grad():
        expected = x @ (wrapped.get_base_weight().float() + wrapped.get_delta_weight("default")).T + layer.bias
        assert_close(wrapped(x), expected, 1e-2 if name == "nf4-bf16" else 1e-5)


@every_kind
@pytest.mark.parametrize("used", [False, True], ids=["never-run", "run-before"])
def test_merge_then_unmerge_restores_every_bit(make: Callable[[], nn.Module], used: bool) -> None:
    layer, x = make(), torch.randn(3, COLS)
    model = adapt(layer, 500, ("a", "b"))
    if used:
        with model.disable_adapter():
            model(x)
    expected, held = model(x).detach(), everything_held(layer)
    parameter = layer.weight
    model.merge_adapter(["a"])
    model.merge_adapter(["b"])
    assert layer.weight is not parameter
    model(x)
    model.unmerge_adapter()
    assert layer.weight is parameter
    assert_holds_the_same(everything_held(layer), held)
    assert_same_bits(model(x).detach(), expected)


@every_kind
def test_layer_can_be_moved_and_copied_after_unmerge(make: Callable[[], nn.Module]) -> None:
    """Moving the layer does not quantize its packed bytes again."""
    if make is linear_8bit and BITSANDBYTES_NEEDS_GPU:
        pytest.skip("before 0.50 bitsandbytes moves an 8-bit layer to the CPU, where it is, with another result")
    layer, x = make(), torch.randn(3, COLS)
    model = adapt(layer, 500)
    expected = model(x).detach()
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same_bits(model.to("cpu")(x).detach(), expected)
    assert_same_bits(copy.deepcopy(model)(x).detach(), expected)


@every_kind
def test_copy_of_a_merged_model_unmerges_by_itself(make: Callable[[], nn.Module]) -> None:
    layer, x = make(), torch.randn(3, COLS)
    model = adapt(layer, 500)
    expected = model(x).detach()
    model.merge_adapter()
    merged = everything_held(layer)
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert_same_bits(twin(x).detach(), expected)
    assert_holds_the_same(everything_held(layer), merged)
    model.unmerge_adapter()
    assert_same_bits(model(x).detach(), expected)


@every_kind
def test_merged_output_is_that_of_the_requantized_weight(make: Callable[[], nn.Module]) -> None:
    layer, x = make(), torch.randn(3, COLS)
    model = adapt(layer, 500)
    wanted = dequantized(layer).float() + spiel_layer(model).get_delta_weight("default")
    model.merge_adapter()
    got = dequantized(layer).float()
    # Half a step of the grid: 8 bits have 254 steps over the range, 4 bits at most 6.6 in their widest gap.
    steps = 250 if layer.weight.dtype == torch.int8 else 6
    assert (got - wanted).abs().max() < wanted.abs().max() / steps
    with torch.no_grad():
        assert_close(model(x), x @ got.T + layer.bias, 2e-2)


@every_kind
def test_disable_adapter_gives_the_exact_base_outputs_also_while_merged(make: Callable[[], nn.Module]) -> None:
    layer, x = make(), torch.randn(3, COLS)
    with torch.no_grad():
        expected = copy.deepcopy(layer).train()(x)
        model = adapt(layer, 500).train()
        for merged in (False, True):
            if merged:
                model.merge_adapter()
            with model.disable_adapter():
                assert_same_bits(model(x), expected)


@every_kind
def test_merge_between_forward_and_backward_is_noticed(make: Callable[[], nn.Module]) -> None:
    layer, x = make(), torch.randn(3, COLS, requires_grad=True)
    model = adapt(layer, 500)
    out = model(x)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="a base weight was changed .* between a forward pass and its backward"):
        out.sum().backward()


def fresh_4bit() -> nn.Module:
    return bnb.nn.Linear4bit(COLS, 64)


def transposed_4bit() -> nn.Module:
    layer = linear_4bit()
    layer.in_features, layer.out_features = layer.out_features, layer.in_features
    return layer


UNREADABLE = {
    "4bit-not-quantized": (fresh_4bit, "has not been quantized yet"),
    "8bit-not-quantized": (lambda: bnb.nn.Linear8bitLt(COLS, 64, has_fp16_weights=False), "not been quantized yet"),
    "8bit-training-in-half": (lambda: bnb.nn.Linear8bitLt(COLS, 64).to("cpu"), "with has_fp16_weights=False"),
    "4bit-other-shape": (transposed_4bit, r"holds a packed weight of shape \(64, 128\), not \(128, 64\)"),
}


@pytest.mark.parametrize("make, reason", UNREADABLE.values(), ids=UNREADABLE)
def test_weight_that_cannot_be_read_as_a_matrix_is_refused(make: Callable[[], nn.Module], reason: str) -> None:
    base = Single(make())
    layer = base.layer
    with pytest.raises(ValueError, match=rf"layer \(bitsandbytes.nn.modules.Linear.*\) .*{reason}"):
        get_peft_model(base, SpIELConfig(r=1, target_modules=["layer"]))
    assert base.layer is layer


def test_values_of_a_quantized_layer_are_float32() -> None:
    for make in (linear_8bit, linear_4bit, lambda: linear_4bit(compute=torch.bfloat16)):
        assert values_of(adapt(make())).dtype == torch.float32


@pytest.mark.parametrize("make", [linear_8bit, linear_4bit], ids=["8bit", "4bit"])
def test_two_threads_in_quantized_layers_get_their_own_weights(make: Callable[[], nn.Module]) -> None:
    """Layers share one buffer, which holds a layer's weight until its product has been issued."""
    models = [adapt(make(), 300), adapt(make(), 300)]
    inputs = [torch.randn(3, COLS, requires_grad=True) for _ in models]
    expected = []
    for model, x in zip(models, inputs, strict=True):
        out = model(x)
        expected.append((out.detach(), *torch.autograd.grad(out.square().sum(), [x, values_of(model)])))
    wrong: list[str] = []

    def work(number: int) -> None:
        model, x = models[number], inputs[number]
        for _ in range(60):
            out = model(x)
            got = (out.detach(), *torch.autograd.grad(out.square().sum(), [x, values_of(model)]))
            wrong.extend(
                name
                for name, a, b in zip(("out", "input", "values"), got, expected[number], strict=True)
                if not torch.equal(a, b)
            )

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
