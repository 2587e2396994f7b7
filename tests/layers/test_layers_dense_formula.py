"""Forward and every gradient of every kind of layer against ``W + scatter(delta)`` by plain autograd in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.layers import CASES, LayerCase, adapt, as_reference, dense_formula, spiel_layer, values_of
from support.tensors import assert_close
from torch import Tensor, nn

TOLERANCE = 1e-5


def check_against_formula(
    layer: nn.Module, x: Tensor, adapters: tuple[str, ...] = ("default",), k: int = 7, tolerance: float = TOLERANCE
) -> None:
    """Adapt the layer, train its bias and weight too, and compare everything with the dense formula."""
    reference, weight = as_reference(layer), layer.weight.detach().clone()
    model = adapt(layer, k, adapters)
    wrapped = spiel_layer(model)
    layer.weight.requires_grad_()
    bias = getattr(layer, "bias", None)
    if bias is not None:
        bias.requires_grad_()
    if x.is_floating_point():
        x = x.clone().requires_grad_()
    out = model(x)
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    expected = dense_formula(wrapped, reference, weight, x, grad_out, adapters)
    assert_close(out, expected.out, tolerance, "output")
    if x.is_floating_point():
        assert_close(x.grad, expected.grad_input, tolerance, "input gradient")
    if bias is not None:
        assert_close(bias.grad, expected.grad_bias, tolerance, "bias gradient")
    assert_close(layer.weight.grad, expected.grad_weight, tolerance, "weight gradient")
    for name in adapters:
        assert_close(values_of(model, name).grad, expected.grad_values[name], tolerance, f"gradient of {name}")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_kind(case: LayerCase) -> None:
    check_against_formula(*case.build())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_kind_in_float64(case: LayerCase) -> None:
    layer, x = case.build(torch.float64)
    check_against_formula(layer, x, tolerance=1e-6)  # the deltas are float32


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_three_adapters_add_up(case: LayerCase) -> None:
    """A small weight with many deltas, so that positions of several adapters coincide."""
    check_against_formula(*case.build(), adapters=("a", "b", "c"), k=min(40, case.make().weight.numel()))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("k", [1, "all"])
def test_one_delta_and_all_of_them(case: LayerCase, k: int | str) -> None:
    layer, x = case.build()
    check_against_formula(layer, x, k=layer.weight.numel() if k == "all" else 1)


PADDINGS = ["zeros", "reflect", "replicate", "circular"]


@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("padding", [0, 2, "same", "valid"])
@pytest.mark.parametrize("kernel", [3, 4], ids="kernel{}".format)
@pytest.mark.parametrize("dims", [1, 2, 3], ids="{}d".format)
def test_convolution_padding(dims: int, kernel: int, padding: int | str, padding_mode: str) -> None:
    """An even kernel with 'same' padding pads one side more than the other."""
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    layer = kind(2, 2, (kernel, *[2] * (dims - 1)), padding=padding, padding_mode=padding_mode)
    check_against_formula(layer, torch.randn(2, 2, *[5] * dims))


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv2d-groups", "conv3d"])
def test_unbatched_convolution(name: str) -> None:
    layer, x = CASES[name].build()
    check_against_formula(layer, x[0])


def strided_weight(layer: nn.Module) -> nn.Module:
    """The same weight with another order in memory."""
    weight = layer.weight.detach()
    reordered = weight.transpose(0, -1).contiguous().transpose(0, -1)
    assert not reordered.is_contiguous()
    layer.weight = nn.Parameter(reordered)
    return layer


@pytest.mark.parametrize("name", ["linear", "transposed", "embedding", "conv1d", "conv2d-groups"])
def test_strided_base_weight(name: str) -> None:
    layer, x = CASES[name].build()
    check_against_formula(strided_weight(layer), x)


STRIDED_INPUTS: dict[str, tuple[str, Callable[[], Tensor]]] = {
    "linear-transposed": ("linear", lambda: torch.randn(9, 5).T),
    "linear-sliced": ("linear", lambda: torch.randn(4, 6, 18)[::2, :, ::2]),
    "linear-expanded": ("linear", lambda: torch.randn(1, 9).expand(4, 9)),
    "transposed-sliced": ("transposed", lambda: torch.randn(4, 6, 18)[::2, :, ::2]),
    "embedding-transposed": ("embedding", lambda: torch.randint(11, (5, 3)).T),
    "conv2d-channels-last": ("conv2d", lambda: torch.randn(2, 3, 9, 8).to(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("name, x", STRIDED_INPUTS.values(), ids=STRIDED_INPUTS)
def test_strided_input(name: str, x: Callable[[], Tensor]) -> None:
    assert not x().is_contiguous()
    check_against_formula(CASES[name].build()[0], x())


@pytest.mark.parametrize("name", [name for name in CASES if name != "linear-vector"])
def test_empty_batch(name: str) -> None:
    """All gradients exist and are zero."""
    layer, x = CASES[name].build()
    check_against_formula(layer, x[:0])


def test_empty_list_of_ids() -> None:
    check_against_formula(nn.Embedding(11, 6), torch.empty(0, dtype=torch.int64))
