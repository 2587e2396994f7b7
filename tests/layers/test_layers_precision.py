"""Half-precision base layers, autocast, and inputs of a dtype that the base layer refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from support.layers import CASES, LayerCase, adapt, as_reference, dense_formula, spiel_layer, values_of
from support.tensors import assert_close, assert_same_bits
from torch import nn

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_half_precision_base(case: LayerCase, dtype: torch.dtype) -> None:
    """Errors stay at the scale of one rounding; the deltas and their gradients are float32."""
    layer, x = case.build(dtype)
    reference, weight = as_reference(layer), layer.weight.detach().clone()
    model = adapt(layer)
    assert values_of(model).dtype == torch.float32
    if x.is_floating_point():
        x.requires_grad_()
    out = model(x)
    assert out.dtype == dtype
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    expected = dense_formula(spiel_layer(model), reference, weight, x, grad_out, ("default",))
    tolerance = 4 * torch.finfo(dtype).eps
    assert_close(out, expected.out, tolerance, "output")
    if x.is_floating_point():
        assert_close(x.grad, expected.grad_input, tolerance, "input gradient")
    # Products of half-precision numbers, summed in float32: nothing is rounded to half precision.
    assert values_of(model).grad.dtype == torch.float32
    assert_close(values_of(model).grad, expected.grad_values["default"], 1e-5, "gradient of values")


@pytest.mark.parametrize("adapter_dtype", ["float16", "bfloat16"])
def test_values_in_half_precision_get_gradients_in_it(adapter_dtype: str) -> None:
    layer, x = CASES["linear"].build()
    model = adapt(layer, delta_dtype=adapter_dtype)
    model(x).sum().backward()
    assert values_of(model).grad.dtype == values_of(model).dtype == getattr(torch, adapter_dtype)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_autocast_gives_the_bits_of_the_merged_base_layer(case: LayerCase, weight_dtype: torch.dtype) -> None:
    layer, x = case.build(weight_dtype)
    model = adapt(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        with torch.no_grad():
            model.merge_adapter()
            merged = model(x)
    assert_same_bits(out.detach(), merged)


@pytest.mark.parametrize("name", ["linear", "transposed", "conv2d"])
def test_gradients_under_autocast(name: str) -> None:
    """Those of the dense formula on tensors rounded to bfloat16, returned in the dtypes of the leaves."""
    layer, x = CASES[name].build()
    model = adapt(layer)
    layer.bias.requires_grad_()
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    expected = dense_formula(spiel_layer(model), as_reference(layer), layer.weight, x, grad_out, ("default",))
    tolerance = 8 * torch.finfo(torch.bfloat16).eps
    assert_close(out, expected.out, tolerance, "output")
    assert_close(x.grad, expected.grad_input, tolerance, "input gradient")
    assert_close(layer.bias.grad, expected.grad_bias, tolerance, "bias gradient")
    assert_close(values_of(model).grad, expected.grad_values["default"], tolerance, "gradient of values")
    assert x.grad.dtype == layer.bias.grad.dtype == values_of(model).grad.dtype == torch.float32


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize("name", ["linear", "transposed", "conv1d"])
def test_foreign_dtype_raises_the_error_of_the_base_layer(name: str, hooked: bool) -> None:
    layer, x = CASES[name].build()
    with pytest.raises(RuntimeError) as expected:
        copy.deepcopy(layer)(x.to(torch.bfloat16))
    model = adapt(layer)
    if hooked:
        layer.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(RuntimeError) as got:
        model(x.to(torch.bfloat16))
    assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("bad", [-1, 11], ids=["negative", "too-large"])
def test_id_out_of_range_raises_as_in_the_base_layer(bad: int) -> None:
    model = adapt(nn.Embedding(11, 6))
    with pytest.raises(IndexError, match="index out of range"):
        model(torch.tensor([[3, bad]]))
