"""The merged model has the outputs of the adapted one, and unmerging restores every bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from support.adapters import adapted, assert_unchanged, deltas_of, layers_of, snapshot, spiel_config, trainable
from support.models import logits, tiny_llama
from support.tensors import same_bits
from torch import nn

from spiel_peft import SpIELLayer

ALL = "all-linear"


def two_adapters(dtype: torch.dtype = torch.float32) -> PeftModel:
    model = adapted(tiny_llama(dtype=dtype), target_modules=ALL)
    model.add_adapter("other", spiel_config(target_modules=["q_proj", "up_proj"], seed=3))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(dtype: torch.dtype, safe_merge: bool) -> None:
    model = adapted(tiny_llama(dtype=dtype), target_modules=ALL)
    before, expected = snapshot(model), logits(model)
    with model.disable_adapter():
        plain = logits(model)
    model.merge_adapter(safe_merge=safe_merge)
    assert same_bits(logits(model), expected)
    assert not torch.equal(expected, plain)
    model.unmerge_adapter()
    assert_unchanged(model, before)
    assert same_bits(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_and_unload(dtype: torch.dtype) -> None:
    model = adapted(tiny_llama(dtype=dtype), target_modules=ALL)
    expected, plain = logits(model), tiny_llama(dtype=dtype)
    deltas = deltas_of(model)
    merged = model.merge_and_unload()
    assert type(merged) is type(plain) and not layers_of(merged)
    assert same_bits(logits(merged), expected)
    assert not hasattr(merged, "peft_config")
    for name, parameter in plain.named_parameters():
        changed = torch.nonzero(merged.get_parameter(name).flatten() != parameter.flatten()).flatten()
        delta = deltas.get(name.removesuffix(".weight"))
        assert set(changed.tolist()) <= (set(delta.indices.tolist()) if delta is not None else set())


def test_unload_gives_the_base_model_back() -> None:
    model = adapted(target_modules=ALL)
    base = model.unload()
    assert not layers_of(base)
    assert_unchanged(base, snapshot(tiny_llama()))


def test_unload_of_a_merged_model_gives_the_original_weights_back() -> None:
    model = adapted(target_modules=ALL)
    model.merge_adapter()
    assert_unchanged(model.unload(), snapshot(tiny_llama()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_adapters_one_by_one_or_together_is_one_sum(dtype: torch.dtype) -> None:
    model = two_adapters(dtype)
    before = snapshot(model)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert same_bits(logits(model), expected)
    assert {tuple(layer.merged_adapters) for layer in layers_of(model)} == {("default",), ("default", "other")}
    model.unmerge_adapter()
    assert_unchanged(model, before)
    model.merge_adapter(["default", "other"])
    assert same_bits(logits(model), expected)
    model.unmerge_adapter()
    assert_unchanged(model, before)


def test_merging_again_warns_and_changes_nothing() -> None:
    model = adapted()
    model.merge_adapter()
    merged = snapshot(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert_unchanged(model, merged)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


BROKEN = {"nan": (torch.float32, float("nan")), "inf": (torch.float32, float("inf")), "overflow": (torch.float16, 1e5)}


@pytest.mark.parametrize(("dtype", "value"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("unload", [False, True])
def test_safe_merge_refuses_a_broken_adapter_everywhere(dtype: torch.dtype, value: float, unload: bool) -> None:
    model = adapted(tiny_llama(dtype=dtype), target_modules=ALL)
    deltas_of(model)["model.layers.1.mlp.down_proj"].values.data[7] = value
    before = snapshot(model)
    merge = model.merge_and_unload if unload else model.merge_adapter
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"):
        merge(safe_merge=True)
    assert_unchanged(model, before)
    assert all(layer.merged_adapters == [] for layer in layers_of(model))


def test_a_refused_safe_merge_keeps_what_was_merged_before() -> None:
    model = two_adapters()
    deltas_of(model, "other")["model.layers.1.mlp.up_proj"].values.data[0] = float("nan")
    model.merge_adapter(["default"])
    merged = snapshot(model)
    with pytest.raises(ValueError, match="The adapter other seems to be broken"):
        model.merge_adapter(["other"], safe_merge=True)
    assert_unchanged(model, merged)
    assert all(layer.merged_adapters == ["default"] for layer in layers_of(model))


def test_an_error_in_the_third_layer_leaves_nothing_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(target_modules=ALL)
    before = snapshot(model)
    third = layers_of(model)[2]

    def fail(layer: SpIELLayer, adapter_names: list[str]) -> None:
        raise OSError("disk")

    monkeypatch.setattr(third.merging, "_write", fail)
    with pytest.raises(OSError, match="disk"):
        model.merge_adapter()
    assert_unchanged(model, before)


@pytest.mark.parametrize("names", [["absent"], ["default", "absent"]])
@pytest.mark.parametrize("unload", [False, True])
def test_unknown_adapters_are_named(names: list[str], unload: bool) -> None:
    model = two_adapters()
    before = snapshot(model)
    merge = model.merge_and_unload if unload else model.merge_adapter
    with pytest.raises(ValueError, match=r"\['absent'\] do not exist; there are \['default', 'other'\]"):
        merge(adapter_names=names)
    assert_unchanged(model, before)


def test_a_string_of_names_is_peft_s_type_error() -> None:
    with pytest.raises(TypeError, match="adapter_names should be a list"):
        adapted().merge_adapter("default")


def test_adding_and_loading_wait_for_unmerge(saved) -> None:
    model = adapted(saved.load_base(), seed=9)
    model.merge_adapter()
    merged = snapshot(model)
    attempts = [
        lambda: model.add_adapter("other", spiel_config()),
        lambda: model.load_adapter(saved.adapter, "other"),
        lambda: model.load_adapter(saved.adapter, "default"),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=r"'default'.*merged.*unmerge_adapter\(\) first"):
            attempt()
        assert_unchanged(model, merged)
        assert list(model.peft_config) == ["default"]
    model.unmerge_adapter()
    model.load_adapter(saved.adapter, "default")
    assert same_bits(logits(model), saved.logits)


def test_deleting_a_merged_adapter_is_refused() -> None:
    model = two_adapters()
    model.merge_adapter(["default"])
    merged = snapshot(model)
    with pytest.raises(ValueError, match="Please unmerge them first"):
        model.delete_adapter("default")
    assert_unchanged(model, merged)
    assert list(model.peft_config) == ["default", "other"]


def test_switching_while_merged_keeps_the_merged_weights_until_unmerge() -> None:
    """As for LoRA: the merged adapter stays in the weights, whichever is active."""
    model = two_adapters()
    before, first = snapshot(model), logits(model)
    model.set_adapter("other")
    second = logits(model)
    model.set_adapter("default")
    model.merge_adapter()
    model.set_adapter("other")
    model.unmerge_adapter()
    assert_unchanged(model, before)
    assert same_bits(logits(model), second)
    model.set_adapter("default")
    assert same_bits(logits(model), first)


def test_disabling_a_merged_adapter_unmerges_it() -> None:
    model = adapted(target_modules=ALL)
    before = snapshot(model)
    model.merge_adapter()
    with model.disable_adapter():
        plain = logits(model)
    assert same_bits(plain, logits(tiny_llama()))
    assert_unchanged(model, before)


def weight_of(layer: nn.Module) -> torch.Tensor:
    return layer.get_base_layer().weight


def test_merging_writes_in_place_and_keeps_parameter_objects() -> None:
    model = adapted(target_modules=ALL)
    parameters = [weight_of(layer) for layer in layers_of(model)]
    pointers = [parameter.data_ptr() for parameter in parameters]
    model.merge_adapter()
    assert [weight_of(layer).data_ptr() for layer in layers_of(model)] == pointers
    model.unmerge_adapter()
    assert all(weight_of(layer) is parameter for layer, parameter in zip(layers_of(model), parameters, strict=True))


@pytest.mark.parametrize("fields", [{}, {"trainable_token_indices": [1, 2]}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("late", [False, True])
def test_an_interrupt_of_merge_and_unload_leaves_the_adapted_model(fields, late: bool, monkeypatch) -> None:
    """Not one in which some modules have lost their deltas, and some base weights their values."""
    model = adapted(**fields)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.add_(0.1)
    before, expected = snapshot(model), logits(model)
    last, merge = layers_of(model)[-1], SpIELLayer.merge

    def interrupted(layer: SpIELLayer, *args: Any, **kwargs: Any) -> None:
        if layer is not last or late:
            merge(layer, *args, **kwargs)
        if layer is last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SpIELLayer, "merge", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.merge_and_unload()
    assert_unchanged(model, before)
    assert same_bits(logits(model), expected)
    assert same_bits(logits(model.merge_and_unload()), expected)
