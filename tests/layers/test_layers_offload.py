"""Base layers that accelerate offloads: forward and backward load their weights and offload them again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from peft import get_peft_model
from support.layers import CASES, adapt, spiel_layer, values_of
from support.tensors import assert_same_bits
from torch import Tensor, nn

from spiel_peft import SpIELConfig

KINDS = ["linear", "transposed", "embedding", "conv2d"]


def with_align_hook(layer: nn.Module) -> nn.Module:
    weights = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights, place_submodules=False)
    return add_hook_to_module(layer, hook)


def with_two_hooks(layer: nn.Module) -> nn.Module:
    return add_hook_to_module(with_align_hook(layer), AlignDevicesHook(io_same_device=True), append=True)


def with_cpu_offload(layer: nn.Module) -> nn.Module:
    return cpu_offload(layer, execution_device=torch.device("cpu"))


OFFLOADERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "cpu_offload": with_cpu_offload,
    "align-hook": with_align_hook,
    "sequential-hook": with_two_hooks,
}


def passes(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, gradient of the values, gradient of the input."""
    if x.is_floating_point():
        x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return out.detach(), values_of(model).grad, x.grad if x.is_floating_point() else None


def assert_same_passes(model: nn.Module, x: Tensor, expected: tuple[Tensor, Tensor, Tensor | None]) -> None:
    for got, want in zip(passes(model, x), expected, strict=True):
        if want is not None:
            assert_same_bits(got, want)


@pytest.mark.parametrize("offload", OFFLOADERS.values(), ids=OFFLOADERS)
@pytest.mark.parametrize("name", KINDS)
def test_offloaded_before_adapting(name: str, offload: Callable[[nn.Module], nn.Module]) -> None:
    layer, x = CASES[name].build()
    plain = adapt(CASES[name].make())
    spiel_layer(plain).base_layer.load_state_dict(layer.state_dict())
    model = adapt(offload(layer))
    assert layer.weight.is_meta and not values_of(model).is_meta
    values_of(model).data.copy_(values_of(plain))
    assert_same_passes(model, x, passes(plain, x))
    assert layer.weight.is_meta, "the weight leaves again"


@pytest.mark.parametrize("offload", OFFLOADERS.values(), ids=OFFLOADERS)
@pytest.mark.parametrize("name", KINDS)
def test_offloaded_after_adapting(name: str, offload: Callable[[nn.Module], nn.Module]) -> None:
    layer, x = CASES[name].build()
    model = adapt(layer)
    expected = passes(model, x)
    offload(layer)
    assert layer.weight.is_meta
    assert_same_passes(model, x, expected)
    assert layer.weight.is_meta
    remove_hook_from_submodules(model)
    assert_same_passes(model, x, expected)


def test_graph_does_not_hold_the_weight() -> None:
    """Weights are offloaded between forward and backward; else a whole model would stay on the device."""
    layer, x = CASES["linear"].build()
    model = adapt(with_align_hook(layer))
    out = model(x.requires_grad_())
    held = out.grad_fn
    assert layer.weight.is_meta
    assert held.state.parameter is None
    out.sum().backward()
    assert values_of(model).grad is not None


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def adapted_pair() -> nn.Module:
    torch.manual_seed(0)
    config = SpIELConfig(density=0.3, target_modules=["embed", "head"], init_weights=False, growth="none")
    return get_peft_model(Pair(), config)


def loss_and_grads(model: nn.Module, ids: Tensor) -> list[Tensor]:
    loss = model(ids).square().sum()
    loss.backward()
    return [loss.detach(), *[p.grad for name, p in model.named_parameters() if name.endswith(".values")]]


def dispatched(model: Pair, folder: Path) -> nn.Module:
    """A model of which one layer is offloaded, as `from_pretrained(device_map=...)` makes it."""
    return dispatch_model(model, {"embed": "cpu", "head": "disk"}, offload_dir=str(folder), force_hooks=True)


def on_disk(model: Pair, folder: Path) -> nn.Module:
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("dispatch", [dispatched, on_disk], ids=["device-map", "disk-offload"])
def test_dispatched_model(dispatch: Callable[[Pair, Path], nn.Module], tmp_path: Path) -> None:
    ids = torch.randint(11, (3, 4))
    expected = loss_and_grads(adapted_pair(), ids)
    torch.manual_seed(0)
    model = dispatch(Pair(), tmp_path)
    config = SpIELConfig(density=0.3, target_modules=["embed", "head"], init_weights=False, growth="none")
    got = loss_and_grads(get_peft_model(model, config), ids)
    assert model.head.base_layer.weight.is_meta
    for tensor, want in zip(got, expected, strict=True):
        assert_same_bits(tensor, want)


@pytest.mark.parametrize("name", KINDS)
def test_merge_and_unmerge_reach_the_offloaded_weight(name: str) -> None:
    layer, x = CASES[name].build()
    before = layer.weight.detach().clone()
    model = adapt(with_align_hook(layer))
    with torch.no_grad():
        out = model(x)
        model.merge_adapter()
        assert_same_bits(model(x), out)
        model.unmerge_adapter()
        assert_same_bits(model(x), out)
    remove_hook_from_submodules(model)
    assert_same_bits(layer.weight.detach(), before)


@pytest.mark.parametrize("name", KINDS)
def test_disabling_a_merged_adapter_restores_the_offloaded_weight(name: str) -> None:
    """A merged layer with disabled adapters unmerges itself in its forward pass."""
    layer, x = CASES[name].build()
    with torch.no_grad():
        expected = layer(x)
        model = adapt(with_align_hook(layer))
        out = model(x)
        model.merge_adapter()
        with model.disable_adapter():
            assert_same_bits(model(x), expected)
        assert_same_bits(model(x), out)
        spiel_layer(model).merge()
        assert_same_bits(model(x), out)
        assert layer.weight.is_meta


def test_merging_into_a_weight_that_cannot_be_brought_in_is_refused_by_name() -> None:
    layer, x = CASES["linear"].build()
    model = adapt(with_two_hooks(layer))
    out = model(x)
    with pytest.raises(RuntimeError, match="layer: cannot write to a base weight that is offloaded"):
        model.merge_adapter()
    assert not spiel_layer(model).merged
    assert_same_bits(model(x), out)


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_offloaded_layer_with_its_own_forward_is_refused_by_name() -> None:
    model = adapt(with_align_hook(OwnForward(6, 5)))
    with pytest.raises(RuntimeError, match="layer: a OwnForward with a forward pass of its own cannot be"):
        model(torch.randn(2, 6))
