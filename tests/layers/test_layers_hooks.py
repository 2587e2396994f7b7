"""Hooks on the base layer: they fire once, see the adapted output and may change values, as without an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.layers import CASES, adapt, spiel_layer, values_of
from support.tensors import assert_same_bits
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

KINDS = ["linear", "transposed", "embedding", "conv2d"]
WHEN = ["before-adapting", "after-adapting"]


class SubclassedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def build(name: str, when: str, register: Callable[[nn.Module], Any]) -> tuple[nn.Module, nn.Module, Tensor]:
    """An adapted layer with a hook, a base layer, an input."""
    layer, x = CASES[name].build() if name in CASES else (SubclassedLinear(9, 13), torch.randn(5, 9))
    if when == "before-adapting":
        register(layer)
        return adapt(layer), layer, x
    model = adapt(layer)
    register(layer)
    return model, layer, x


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", [*KINDS, "subclass"])
def test_forward_hook_sees_and_changes_the_adapted_output(name: str, when: str) -> None:
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        seen.append(out)
        return out * 2

    model, layer, x = build(name, when, lambda module: module.register_forward_hook(hook))
    out = model(x)
    assert len(seen) == 1
    assert_same_bits(out.detach(), seen[0].detach() * 2)
    layer._forward_hooks.clear()
    assert_same_bits(model(x).detach(), seen[0].detach())
    out.sum().backward()
    assert values_of(model).grad is not None


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", ["linear", "transposed", "conv2d", "subclass"])
def test_forward_pre_hook_changes_the_input(name: str, when: str) -> None:
    calls: list[int] = []

    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        calls.append(1)
        return (args[0] * 3,)

    model, layer, x = build(name, when, lambda module: module.register_forward_pre_hook(hook))
    out = model(x)
    assert len(calls) == 1
    layer._forward_pre_hooks.clear()
    assert_same_bits(out.detach(), model(x * 3).detach())


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", ["linear", "transposed", "conv2d", "subclass"])
def test_full_backward_hooks_fire_once_and_change_the_input_gradient(name: str, when: str) -> None:
    calls: list[str] = []

    def register(module: nn.Module) -> None:
        module.register_full_backward_pre_hook(lambda m, grad_out: calls.append("pre"))
        module.register_full_backward_hook(lambda m, grad_in, grad_out: calls.append("post") or (grad_in[0] * 5,))

    model, layer, x = build(name, when, register)
    x.requires_grad_()
    model(x).sum().backward()
    assert calls == ["pre", "post"]
    hooked, x.grad = x.grad, None
    layer._backward_hooks.clear()
    layer._backward_pre_hooks.clear()
    model(x).sum().backward()
    assert_same_bits(hooked, x.grad * 5)


def test_hooks_of_all_modules_see_the_base_layer() -> None:
    layer, x = CASES["linear"].build()
    model = adapt(layer)
    seen: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        model(x)
    finally:
        handle.remove()
    assert seen.count(layer) == 1


def test_a_hook_that_raises_leaves_the_layer_as_it_was() -> None:
    layer, x = CASES["linear"].build()
    model = adapt(layer)
    expected = model(x).detach()

    def hook(module: nn.Module, args: tuple[Tensor]) -> None:
        raise KeyError("a hook's own error")

    handle = layer.register_forward_pre_hook(hook)
    with pytest.raises(KeyError, match="a hook's own error"):
        model(x)
    handle.remove()
    assert "forward" not in vars(layer)
    assert_same_bits(model(x).detach(), expected)


@pytest.mark.parametrize("merged", [False, True], ids=["disabled", "merged"])
def test_hooks_fire_once_without_deltas_too(merged: bool) -> None:
    layer, x = CASES["linear"].build()
    calls: list[int] = []
    layer.register_forward_hook(lambda module, args, out: calls.append(1))
    model = adapt(layer)
    if merged:
        model.merge_adapter()
        model(x)
    else:
        with model.disable_adapter():
            model(x)
    assert len(calls) == 1 and spiel_layer(model).merged == merged
