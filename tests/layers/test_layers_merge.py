"""Merging: the merged output has the bits of the unmerged one, and unmerging restores the bits of the base."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.layers import CASES, HALF_AND_FULL, LayerCase, adapt, spiel_layer, values_of
from support.tensors import assert_close, assert_same_bits
from torch import Tensor, nn

from spiel_peft import SpIELConfig
from spiel_peft.layers import merging

NAN_MESSAGE = "NaNs detected in the merged weights"
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_dtype = pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)


@every_case
@every_dtype
@pytest.mark.parametrize("adapters", [("a",), ("a", "b")], ids=["one", "two"])
def test_merged_and_unmerged_outputs_are_bitwise_equal(
    case: LayerCase, dtype: torch.dtype, adapters: tuple[str, ...]
) -> None:
    layer, x = case.build(dtype)
    before = layer.weight.detach().clone()
    model = adapt(layer, layer.weight.numel() // 2, adapters)
    with torch.no_grad():
        out = model(x)
        model.merge_adapter()
        assert_same_bits(model(x), out, "merged output")
        model.unmerge_adapter()
        assert_same_bits(layer.weight.detach(), before, "base weight")
        assert_same_bits(model(x), out, "output after unmerging")


@every_case
@every_dtype
def test_merged_weight_is_the_sum_rounded_once(case: LayerCase, dtype: torch.dtype) -> None:
    layer, _ = case.build(dtype)
    model = adapt(layer, 8, ("a", "b"))
    wrapped = spiel_layer(model)
    expected = layer.weight.detach().float()
    for name in ("a", "b"):
        expected = expected + wrapped.get_delta_weight(name)
    model.merge_adapter()
    assert_same_bits(layer.weight.detach(), expected.to(dtype))


@every_case
def test_merging_one_by_one_equals_merging_together(case: LayerCase) -> None:
    layer, _ = case.build(torch.bfloat16)
    before = layer.weight.detach().clone()
    model = adapt(layer, 8, ("a", "b", "c"))
    model.merge_adapter()
    together = layer.weight.detach().clone()
    model.unmerge_adapter()
    for name in ("a", "b", "c"):
        model.merge_adapter([name])
    assert spiel_layer(model).merged_adapters == ["a", "b", "c"]
    assert_same_bits(layer.weight.detach(), together)
    model.unmerge_adapter()
    assert_same_bits(layer.weight.detach(), before)


@every_case
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_disable_adapter_gives_the_exact_base_outputs(case: LayerCase, merged: bool) -> None:
    layer, x = case.build()
    with torch.no_grad():
        expected = copy.deepcopy(layer)(x)
        model = adapt(layer)
        adapted = model(x)
        if merged:
            model.merge_adapter()
        with model.disable_adapter():
            assert_same_bits(model(x), expected)
        assert not torch.equal(adapted, expected)
        assert_same_bits(model(x), adapted)


@every_case
def test_merge_and_unload_gives_a_plain_layer_with_the_same_outputs(case: LayerCase) -> None:
    layer, x = case.build()
    with torch.no_grad():
        model = adapt(layer)
        out = model(x)
        plain = model.merge_and_unload()
        assert plain.layer is layer
        assert_same_bits(plain(x), out)


def test_delta_weight_is_dense_in_the_shape_of_the_weight() -> None:
    for case in CASES.values():
        layer = case.make()
        wrapped = spiel_layer(adapt(layer, 8))
        delta = wrapped.spiel_delta["default"]
        dense = wrapped.get_delta_weight("default")
        assert dense.shape == layer.weight.shape and dense.dtype == delta.values.dtype
        assert not dense.requires_grad and int((dense != 0).sum()) == 8
        assert_same_bits(dense.flatten()[delta.indices.long()], delta.values.detach())


@every_case
def test_strided_weight_is_merged_and_restored(case: LayerCase) -> None:
    layer, x = case.build()
    weight = layer.weight.detach().transpose(0, -1).contiguous().transpose(0, -1)
    layer.weight = nn.Parameter(weight.clone(memory_format=torch.preserve_format))
    model = adapt(layer)
    with torch.no_grad():
        out = model(x)
        model.merge_adapter()
        assert_close(model(x), out, 1e-6)
        model.unmerge_adapter()
    assert_same_bits(layer.weight.detach(), weight)


def test_safe_merge_refuses_what_is_not_finite_and_leaves_the_base_alone() -> None:
    layer, x = CASES["linear"].build()
    before = layer.weight.detach().clone()
    model = adapt(layer, adapters=("good", "bad"))
    model.merge_adapter(["good"])
    merged = layer.weight.detach().clone()
    with torch.no_grad():
        values_of(model, "bad")[2] = float("nan")
    with pytest.raises(ValueError, match=NAN_MESSAGE):
        spiel_layer(model).merge(safe_merge=True, adapter_names=["bad"])
    assert spiel_layer(model).merged_adapters == ["good"]
    assert_same_bits(layer.weight.detach(), merged)
    model.unmerge_adapter()
    assert_same_bits(layer.weight.detach(), before)


def test_safe_merge_sees_an_overflow_of_the_narrow_dtype() -> None:
    layer = nn.Linear(9, 13).half()
    model = adapt(layer)
    with torch.no_grad():
        values_of(model)[0] = 1e5
    with pytest.raises(ValueError, match=NAN_MESSAGE):
        model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("name", ["linear", "embedding"])
def test_copy_of_a_merged_model_unmerges_by_itself(name: str) -> None:
    layer, x = CASES[name].build()
    before, model = layer.weight.detach().clone(), adapt(layer)
    model.merge_adapter()
    merged = layer.weight.detach().clone()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert_same_bits(spiel_layer(twin).base_layer.weight.detach(), before)
    assert_same_bits(layer.weight.detach(), merged)
    model.unmerge_adapter()
    assert_same_bits(twin(x).detach(), model(x).detach())


def test_parameter_keeps_its_identity() -> None:
    """Merging keeps the parameter object, as optimizers and trainers refer to it."""
    layer, _ = CASES["linear"].build()
    weight, model = layer.weight, adapt(layer)
    model.merge_adapter()
    assert layer.weight is weight
    model.unmerge_adapter()
    assert layer.weight is weight


@pytest.mark.parametrize("change", ["merge", "write"])
@pytest.mark.parametrize("name", ["linear", "transposed", "conv2d"])
def test_weight_changed_between_forward_and_backward_is_noticed(name: str, change: str) -> None:
    layer, x = CASES[name].build()
    model = adapt(layer)
    out = model(x.requires_grad_())
    with torch.no_grad():
        model.merge_adapter() if change == "merge" else layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="a base weight was changed .* between a forward pass and its backward"):
        out.sum().backward()


def test_shared_weight_merged_between_forward_and_backward_is_noticed() -> None:
    """Merging a shared weight gives the layer a new parameter, so that the version of the old one does not change."""
    layer, x = CASES["linear"].build()
    model = adapt(layer)
    spiel_layer(model).shared_with = ("other",)
    weight = layer.weight
    out = model(x.requires_grad_())
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="a base weight was changed"):
        out.sum().backward()
    model.unmerge_adapter()
    assert layer.weight is weight


# --- memory that others use ---


def pair_of_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def another_parameter(net: nn.Sequential) -> Tensor:
    net[1].weight = nn.Parameter(net[0].weight.data)
    return net[1].weight


def a_transposed_view(net: nn.Sequential) -> Tensor:
    net[1].weight = nn.Parameter(net[0].weight.data.T)
    return net[1].weight


def an_overlapping_part(net: nn.Sequential) -> Tensor:
    memory = torch.randn(12, 8)
    net[0].weight, net[1].weight = nn.Parameter(memory[:8]), nn.Parameter(memory[4:])
    return net[1].weight


def a_buffer(net: nn.Sequential) -> Tensor:
    net.register_buffer("copy", net[0].weight.data)
    return net.copy


def another_name(net: nn.Sequential) -> Tensor:
    net.table = net[0].weight
    return net.table


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize(
    "share",
    [another_parameter, a_transposed_view, an_overlapping_part, a_buffer, another_name],
    ids=lambda f: f.__name__,
)
def test_memory_that_others_use_keeps_its_bits(share: Callable[[nn.Sequential], Tensor], unload: bool) -> None:
    net = pair_of_layers()
    other = share(net)
    before = other.detach().clone()
    config = SpIELConfig(density=0.5, target_modules=["0"], init_weights=False)
    model = get_peft_model(net, config).eval()
    x = torch.randn(3, 8)
    expected = model(x)
    if unload:
        assert torch.equal(model.merge_and_unload()(x), expected)
    else:
        model.merge_adapter()
        assert torch.equal(model(x), expected)
    assert torch.equal(other, before)


def test_entries_that_share_memory_are_merged_into_a_copy() -> None:
    net, memory = pair_of_layers(), torch.randn(8 * 4 + 8)
    net[0].weight = nn.Parameter(memory.as_strided((8, 8), (4, 1)))
    before = memory.clone()
    model = get_peft_model(net, SpIELConfig(density=0.5, target_modules=["0"], init_weights=False)).train()
    x = torch.randn(3, 8)
    expected = model(x)
    dense = net[0].get_base_layer().weight.detach() + net[0].get_delta_weight("default")
    torch.testing.assert_close(expected, net[1](nn.functional.linear(x, dense, net[0].get_base_layer().bias)))
    model.merge_adapter()
    assert torch.equal(model(x), expected) and torch.equal(memory, before)
    model.unmerge_adapter()
    assert torch.equal(model(x), expected) and torch.equal(memory, before)


def by_parameter(net: nn.Sequential) -> nn.Sequential:
    return copy.deepcopy(net, {id(parameter): parameter for parameter in net.parameters()})


def by_storage(net: nn.Sequential) -> nn.Sequential:
    """As TRL's `create_reference_model(num_shared_layers=...)` does."""
    other = copy.deepcopy(net)
    for parameter, own in zip(other.parameters(), net.parameters(), strict=True):
        parameter.data = own.data
    return other


def merged_in(base: nn.Sequential, seed: int, **fields: Any) -> PeftModel:
    settings = {"density": 0.5, "target_modules": ["0"], "init_weights": False, "seed": seed, **fields}
    return get_peft_model(base, SpIELConfig(**settings)).eval()


both_ways = pytest.mark.parametrize("twin_of", [by_parameter, by_storage], ids=lambda f: f.__name__)


@both_ways
@pytest.mark.parametrize(
    "fields", [{}, {"target_modules": [], "target_parameters": ["0.weight"]}], ids=["module", "bare"]
)
def test_another_model_on_the_same_weights_sees_nothing_of_a_merge(
    twin_of: Callable[[nn.Sequential], nn.Sequential], fields: dict[str, Any]
) -> None:
    net, x = pair_of_layers(), torch.randn(3, 8)
    other = twin_of(net)
    before, weight = other(x), net[0].weight
    model = merged_in(net, 0, **fields)
    adapted = model(x)
    model.merge_adapter()
    assert torch.equal(model(x), adapted) and torch.equal(other(x), before)
    model.unmerge_adapter()
    assert torch.equal(model(x), adapted) and torch.equal(other(x), before)
    assert dict(model.base_model.model.named_parameters())["0.base_layer.weight"] is weight
    merged = model.merge_and_unload()
    assert torch.equal(merged(x), adapted) and torch.equal(other(x), before)


@both_ways
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_models_on_one_weight_are_merged_and_unmerged_in_any_order(
    twin_of: Callable[[nn.Sequential], nn.Sequential], order: tuple[int, int]
) -> None:
    net, x = pair_of_layers(), torch.randn(3, 8)
    models = [merged_in(base, seed) for seed, base in enumerate((net, twin_of(net)))]
    before, adapted = net[0].get_base_layer().weight.detach().clone(), [model(x) for model in models]
    for model in models:
        model.merge_adapter()
    assert all(torch.equal(model(x), expected) for model, expected in zip(models, adapted, strict=True))
    for number in order:
        models[number].unmerge_adapter()
        assert all(torch.equal(model(x), expected) for model, expected in zip(models, adapted, strict=True))
    assert torch.equal(net[0].get_base_layer().weight, before)
    assert all(torch.equal(model(x), expected) for model, expected in zip(models, adapted, strict=True))


def test_weights_that_no_other_model_uses_are_not_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search takes long; reference counts tell that it is not needed."""
    monkeypatch.setattr(merging, "live_objects", lambda kind: pytest.fail("all live objects were searched"))
    model = merged_in(pair_of_layers(), 0, target_modules=["0", "1"])
    pointer = model.base_model.model[0].get_base_layer().weight.data_ptr()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(torch.randn(3, 8)).sum().backward()
        optimizer.step()
        model.merge_adapter()
        assert model.base_model.model[0].get_base_layer().weight.data_ptr() == pointer
        model.unmerge_adapter()


@both_ways
def test_layers_that_are_merged_one_by_one_look_for_other_models_too(
    twin_of: Callable[[nn.Sequential], nn.Sequential],
) -> None:
    net, x = pair_of_layers(), torch.randn(3, 8)
    other = twin_of(net)
    before, weight = other(x), net[0].weight.detach().clone()
    first, second = (merged_in(base, seed).base_model.model[0] for seed, base in enumerate((net, other)))
    first.merge()
    assert torch.equal(second.get_base_layer().weight, weight)
    second.merge()
    first.unmerge()
    assert torch.equal(first.get_base_layer().weight, weight) and not torch.equal(other(x), before)
    second.unmerge()
    assert torch.equal(second.get_base_layer().weight, weight)
    del second, other
    gc.collect()
    pointer = first.get_base_layer().weight.data_ptr()
    first.merge()
    assert first.get_base_layer().weight.data_ptr() == pointer, "no other model uses the weight any more"
