"""Copies of a model are independent; float32 deltas stay float32 when a trainer casts the model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.adapters import adapted, assert_unchanged, deltas_of, layers_of, snapshot, spiel_config, train
from support.models import IDS, logits, tiny_llama
from support.tensors import same_bits
from torch import nn


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}
copies = pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
CYCLE = {"regrow_every": 2, "accumulation_steps": 1, "total_steps": 12}


@copies
def test_a_copy_trains_on_its_own(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    """Copies train on as the original would have, cycle included, and do not change each other."""
    model = adapted(**CYCLE)
    train(model, steps=3)
    first, second = duplicate(model), duplicate(model)
    before = snapshot(model)
    assert_unchanged(first, before)
    train(first, steps=4)
    assert_unchanged(model, before)
    assert_unchanged(second, before)
    moved = snapshot(first)
    train(second, steps=4)
    assert_unchanged(first, moved)
    assert_unchanged(second, moved)
    assert_unchanged(model, before)
    for delta, *others in zip(*(deltas_of(m).values() for m in (model, first, second)), strict=True):
        assert len({delta.run, *(other.run for other in others)}) == 3
        assert delta.state.step == 3 and all(other.state.step == 7 for other in others)
        assert not torch.equal(delta.indices, others[0].indices)


@copies
def test_the_copy_of_a_merged_model_unmerges(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = adapted()
    before = snapshot(model)
    model.merge_adapter()
    twin = duplicate(model)
    twin.unmerge_adapter()
    assert_unchanged(twin, before)
    assert all(layer.merged for layer in layers_of(model))
    model.unmerge_adapter()
    assert_unchanged(model, before)


@copies
def test_a_copy_keeps_a_shared_delta_shared(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = adapted(tiny_llama(tied=True), target_modules=["embed_tokens"], ensure_weight_tying=True)
    twin = duplicate(model)
    first, second = (layer.spiel_delta["default"] for layer in layers_of(twin))
    assert first is second and first is not layers_of(model)[0].spiel_delta["default"]
    assert same_bits(logits(twin), logits(model))


def cast_all(model: PeftModel, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Cast the trainable parameters of a quantized model as TRL does."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trainable.values():
        parameter.data = parameter.data.to(dtype)
    return trainable


def assert_restored(model: PeftModel, objects: dict[str, nn.Parameter]) -> None:
    now = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert now.keys() == objects.keys()
    assert all(now[name] is parameter for name, parameter in objects.items())
    assert {p.dtype for p in now.values()} == {torch.float32}


RESTORES: dict[str, Callable[[PeftModel], object]] = {
    "train()": lambda model: model.train(),
    "a device move": lambda model: model.to("cpu"),
    "the first training forward": lambda model: model(IDS, labels=IDS).loss.backward(),
}


@pytest.mark.parametrize("restore", RESTORES.values(), ids=RESTORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_trainer_s_cast_is_undone_in_place(restore: Callable[[PeftModel], object], dtype: torch.dtype) -> None:
    model = adapted(tiny_llama(dtype=torch.bfloat16)).train()
    objects = cast_all(model, dtype)
    assert {p.dtype for p in objects.values()} == {dtype}
    restore(model)
    assert_restored(model, objects)


def test_an_optimizer_made_before_the_cast_still_steps_the_deltas() -> None:
    model = adapted(tiny_llama(dtype=torch.bfloat16), growth="none").train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    cast_all(model, torch.bfloat16)
    model(IDS, labels=IDS).loss.backward()
    before = {module: delta.values.detach().clone() for module, delta in deltas_of(model).items()}
    optimizer.step()
    for module, delta in deltas_of(model).items():
        assert delta.values.grad is not None and delta.values.grad.dtype == torch.float32
        assert torch.equal(delta.values, before[module] - delta.values.grad)
        assert not torch.equal(delta.values, before[module])


def test_small_updates_are_not_lost_after_a_cast() -> None:
    """A bfloat16 delta of 0.02 would not move under updates of 1e-5."""
    model = adapted(tiny_llama(dtype=torch.bfloat16), growth="none")
    for delta in deltas_of(model).values():
        delta.values.data.fill_(0.02)
    cast_all(model, torch.bfloat16)
    before = float(torch.tensor(0.02).bfloat16())
    train(model, steps=20, lr=1e-5)
    moved = torch.cat([delta.values.detach() - before for delta in deltas_of(model).values()])
    assert moved.abs().median() > 1e-5


@pytest.mark.parametrize(("cast", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_casting_the_model_casts_the_deltas_until_training(cast: str, dtype: torch.dtype) -> None:
    """`model.half()` casts the values, not the indices; training brings float32 deltas back."""
    model = adapted()
    indices = {module: delta.indices.clone() for module, delta in deltas_of(model).items()}
    getattr(model, cast)()
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits(model).dtype == dtype
    assert all(same_bits(delta.indices, indices[module]) for module, delta in deltas_of(model).items())
    model.train()
    assert {delta.values.dtype for delta in deltas_of(model).values()} == {torch.float32}
    assert {layer.get_base_layer().weight.dtype for layer in layers_of(model)} == {dtype}


def test_to_dtype_behaves_as_half() -> None:
    model = adapted().to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.train()
    assert {delta.values.dtype for delta in deltas_of(model).values()} == {torch.float32}


@pytest.mark.parametrize("fields", [{"delta_dtype": "bfloat16"}, {}], ids=["by config", "by the base"])
def test_deltas_meant_to_be_bfloat16_stay_bfloat16(fields: dict[str, str]) -> None:
    base = tiny_llama(dtype=torch.bfloat16)
    model = get_peft_model(base, spiel_config(**fields), autocast_adapter_dtype=bool(fields))
    assert {delta.values.dtype for delta in deltas_of(model).values()} == {torch.bfloat16}
    train(model, steps=2)
    assert {delta.values.dtype for delta in deltas_of(model).values()} == {torch.bfloat16}


def test_a_float32_config_wins_over_a_half_precision_base() -> None:
    model = adapted(tiny_llama(dtype=torch.float16), delta_dtype="float32")
    assert {delta.values.dtype for delta in deltas_of(model).values()} == {torch.float32}
