"""Only tensors that need a gradient get one, and no tensor of the weight's size is allocated."""

from __future__ import annotations

import pytest
import torch
from support.layers import CASES, LayerCase, adapt, dense_formula, spiel_layer, transposed, values_of
from support.tensors import OpRecorder, assert_close
from torch import Tensor, nn

FLOAT_CASES = {name: case for name, case in CASES.items() if not name.startswith("embedding")}


def backward_ops(model: nn.Module, x: Tensor) -> OpRecorder:
    loss = model(x).sum()
    with OpRecorder() as recorder:
        loss.backward()
    return recorder


@pytest.mark.parametrize("case", FLOAT_CASES.values(), ids=FLOAT_CASES)
def test_input_without_gradient_costs_no_input_gradient(case: LayerCase) -> None:
    """The first layer of a frozen model: the values get gradients, and the backward pass does not read the weight."""
    layer, x = case.build()
    model = adapt(layer)
    recorder = backward_ops(model, x)
    assert values_of(model).grad is not None and x.grad is None
    assert not recorder.reads(layer.weight)
    without = len(recorder.matmuls)
    x.requires_grad_()
    recorder = backward_ops(model, x)
    assert recorder.reads(layer.weight) and len(recorder.matmuls) == without + 1


@pytest.mark.parametrize("case", FLOAT_CASES.values(), ids=FLOAT_CASES)
def test_frozen_values_cost_no_weight_gradient(case: LayerCase) -> None:
    """The backward pass has one matrix product (or convolution): the one that gives the input gradient."""
    layer, x = case.build()
    model = adapt(layer)
    values_of(model).requires_grad_(False)
    x.requires_grad_()
    recorder = backward_ops(model, x)
    assert len(recorder.matmuls) == 1
    assert values_of(model).grad is None and x.grad is not None


def test_frozen_values_save_no_input() -> None:
    layer, x = CASES["linear"].build()
    model = adapt(layer)
    values_of(model).requires_grad_(False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x.requires_grad_())
    assert kept and not any(t.shape == x.shape for t in kept)


def test_nothing_to_train_makes_no_graph() -> None:
    layer, x = CASES["linear"].build()
    model = adapt(layer)
    values_of(model).requires_grad_(False)
    assert not model(x).requires_grad


def test_frozen_and_trained_adapter_together() -> None:
    layer, x = CASES["linear"].build()
    model = adapt(layer, adapters=("language", "task"))
    values_of(model, "language").requires_grad_(False)
    out = model(x)
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    both = ("language", "task")
    expected = dense_formula(spiel_layer(model), layer.double(), layer.weight, x, grad_out, both)
    assert values_of(model, "language").grad is None
    assert_close(values_of(model, "task").grad, expected.grad_values["task"], 1e-5)


def test_inactive_adapter_takes_no_part() -> None:
    layer, x = CASES["linear"].build()
    model = adapt(layer, adapters=("a", "b"))
    model.set_adapter("a")
    model(x).sum().backward()
    assert values_of(model, "a").grad is not None and values_of(model, "b").grad is None


@pytest.mark.parametrize("name", ["linear", "linear-no-bias", "transposed", "conv2d"])
@pytest.mark.parametrize("needs_input_grad", [False, True], ids=["frozen-input", "input-grad"])
@pytest.mark.parametrize("growth", ["none", "accumulated_gradient"])
def test_no_dense_weight_gradient_in_backward(name: str, needs_input_grad: bool, growth: str) -> None:
    """Nothing of the weight's size is allocated: deltas are folded in place, the weight's gradient is never whole.

    Under accumulated_gradient the first backward pass opens a window and selects candidates: in row blocks.
    """
    layers = {
        "linear": nn.Linear(40, 64),
        "linear-no-bias": nn.Linear(40, 64, bias=False),
        "transposed": transposed(40, 64),
        "conv2d": nn.Conv2d(24, 64, 3),
    }
    layer = layers[name]
    x = torch.randn(2, 24, 4, 4) if name == "conv2d" else torch.randn(5, 40)
    x.requires_grad_(needs_input_grad)
    model = adapt(layer, 30, growth=growth)
    recorder = backward_ops(model, x)
    assert (spiel_layer(model).spiel_delta["default"].state.window is None) == (growth == "none")
    numel = layer.weight.numel()
    assert [op.name for op in recorder.ops if numel in op.out_numels] == []


@pytest.mark.parametrize("name", ["linear", "transposed", "conv2d"])
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_no_copy_of_the_weight_in_forward(name: str, grad: bool) -> None:
    layers = {"linear": nn.Linear(40, 64), "transposed": transposed(40, 64), "conv2d": nn.Conv2d(24, 64, 3)}
    layer = layers[name]
    x = torch.randn(2, 24, 4, 4) if name == "conv2d" else torch.randn(5, 40)
    model = adapt(layer, 30)
    before = layer.weight.detach().clone()
    with torch.set_grad_enabled(grad), OpRecorder() as recorder:
        model(x)
    assert recorder.matmuls
    assert [op.name for op in recorder.ops if layer.weight.numel() in op.out_numels] == []
    assert torch.equal(layer.weight, before)


def test_gradients_add_up_over_uses_and_passes() -> None:
    """A layer used twice in a forward pass, in two backward passes."""
    layer, _ = CASES["linear"].build()
    model = adapt(layer)
    first, second = torch.randn(3, 9), torch.randn(4, 9)
    separate = []
    for x in (first, second):
        model.zero_grad()
        model(x).sum().backward()
        separate.append(values_of(model).grad.clone())
    model.zero_grad()
    for _ in range(2):
        (model(first).sum() + model(second).sum()).backward()
    torch.testing.assert_close(values_of(model).grad, 2 * sum(separate))


def test_second_derivatives_are_refused() -> None:
    layer, x = CASES["linear"].build()
    model = adapt(layer)
    out = model(x.requires_grad_()).square().sum()
    (grad,) = torch.autograd.grad(out, values_of(model), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
