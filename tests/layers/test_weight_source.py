"""Each layer owns the source of its adapted weights: built once, not shared with copies, no reference cycle."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from support.layers import adapt, spiel_layer, values_of
from support.quantized import COLS, QUANTIZED
from support.tensors import assert_same_bits
from torch import Tensor, nn

from spiel_peft import SpIELConfig
from spiel_peft.layers import SpIELLayer, SpIELParameter, SpIELParameters
from spiel_peft.targets import inspect_parameter
from spiel_peft.weights.folding import WEIGHT_CHANGED

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "shallow": copy.copy,
}


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return out.detach(), values_of(model).grad.clone()


def test_passes_share_one_source() -> None:
    model = adapt(nn.Linear(9, 13))
    layer = spiel_layer(model)
    source = layer.weight_source
    run(model, torch.randn(5, 9))
    model.add_adapter("other", SpIELConfig(num_deltas=5, target_modules=["layer"]))
    model.set_adapter("other")
    model(torch.randn(5, 9))
    assert layer.weight_source is source and source.state().owner is layer


@pytest.mark.parametrize(
    "kind, way", [*(("plain", way) for way in COPIES), ("nf4", "deepcopy"), ("8bit", "deepcopy"), ("nf4", "shallow")]
)
def test_a_copy_has_a_source_of_its_own(kind: str, way: str) -> None:
    model = adapt(QUANTIZED[kind]() if kind != "plain" else nn.Linear(COLS, 32), init_weights=False)
    layer = spiel_layer(model)
    x = torch.randn(5, COLS)
    expected = run(model, x)
    copied = COPIES[way](layer)
    assert copied.weight_source is not layer.weight_source
    assert copied.weight_source.state().owner is copied and layer.weight_source.state().owner is layer
    assert_same_bits(copied(x).detach(), expected[0])
    if way != "shallow":
        copied.spiel_delta["default"].values.data += 1
        assert not torch.equal(copied(x).detach(), expected[0])
    for got, wanted in zip(run(model, x), expected, strict=True):
        assert_same_bits(got, wanted)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_a_layer_is_freed_without_the_cycle_collector() -> None:
    layer = copy.deepcopy(spiel_layer(adapt(nn.Linear(9, 13))))
    layer(torch.randn(5, 9)).sum().backward()
    freed = weakref.ref(layer)
    del layer
    assert freed() is None


@pytest.mark.usefixtures("no_collector")
def test_bare_parameters_are_freed_without_the_cycle_collector() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table

    base = Scaled()
    host = SpIELParameters(base)
    part = SpIELParameter(host, "table", inspect_parameter(base, "table"), "table")
    host.table = part
    host(torch.randn(2, 4))
    freed = weakref.ref(host), weakref.ref(part), weakref.ref(base)
    del host, part, base
    assert [reference() for reference in freed] == [None, None, None]


def test_a_backward_pass_outlives_its_model() -> None:
    model, x = adapt(nn.Linear(9, 13), init_weights=False), torch.randn(5, 9, requires_grad=True)
    run(model, x)
    expected, x.grad = x.grad, None
    loss, values = model(x).square().sum(), values_of(model)
    del model
    gc.collect()
    values.grad = None
    loss.backward()
    assert_same_bits(x.grad, expected)
    assert values.grad is not None


@pytest.mark.parametrize("change", ["write", "merge"])
def test_a_weight_that_changes_between_the_passes_is_an_error(change: str) -> None:
    model = adapt(nn.Linear(9, 13), init_weights=False)
    layer: SpIELLayer = spiel_layer(model)
    x = torch.randn(5, 9, requires_grad=True)
    loss = model(x).sum()
    if change == "write":
        with torch.no_grad():
            layer.get_base_layer().weight.mul_(2)
    else:
        layer.merge()
    with pytest.raises(RuntimeError) as caught:
        loss.backward()
    assert str(caught.value) == WEIGHT_CHANGED
