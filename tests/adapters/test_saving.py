"""The content of adapter files; every way of loading one gives the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from support.adapters import FILE, PREFIX, adapted, deltas_of, key_of, read_adapter, snapshot, spiel_config, train
from support.models import logits, tiny_llama
from support.tensors import same_bits
from torch import nn
from transformers import AutoModelForCausalLM

from .conftest import Saved

Q = "model.layers.0.self_attn.q_proj"


def test_a_file_holds_values_and_int32_indices_under_names_without_the_adapter(tmp_path: Path) -> None:
    model = adapted(adapter="french")
    model.save_pretrained(tmp_path)
    folder = tmp_path / "french"
    tensors = read_adapter(folder)
    deltas = deltas_of(model, "french")
    assert tensors.keys() == {key_of(module, name) for module in deltas for name in ("values", "indices")}
    assert not any("french" in key for key in tensors)
    for module, delta in deltas.items():
        indices, values = tensors[key_of(module, "indices")], tensors[key_of(module, "values")]
        assert indices.dtype == torch.int32 and values.dtype == torch.float32
        assert same_bits(indices, delta.indices) and same_bits(values, delta.values.detach())
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", FILE}
    assert (tmp_path / "README.md").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "SPIEL"


def peft_model(saved: Saved) -> nn.Module:
    return PeftModel.from_pretrained(saved.load_base(), saved.adapter)


def peft_model_low_memory(saved: Saved) -> nn.Module:
    return PeftModel.from_pretrained(saved.load_base(), saved.adapter, low_cpu_mem_usage=True)


def peft_model_trainable(saved: Saved) -> nn.Module:
    return PeftModel.from_pretrained(saved.load_base(), saved.adapter, is_trainable=True)


def auto_peft_model(saved: Saved) -> nn.Module:
    return AutoPeftModelForCausalLM.from_pretrained(saved.adapter)


def auto_model_of_transformers(saved: Saved) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(saved.adapter)


def load_adapter_of_transformers(saved: Saved) -> nn.Module:
    model = saved.load_base()
    model.load_adapter(saved.adapter, adapter_name="second")
    return model


def second_adapter(saved: Saved, **kwargs: bool) -> nn.Module:
    model = adapted(saved.load_base(), seed=9)
    model.load_adapter(saved.adapter, "second", **kwargs)
    model.set_adapter("second")
    return model


def second_adapter_low_memory(saved: Saved) -> nn.Module:
    return second_adapter(saved, low_cpu_mem_usage=True)


def over_an_existing_adapter(saved: Saved) -> nn.Module:
    model = adapted(saved.load_base(), seed=9)
    model.load_adapter(saved.adapter, "default")
    return model


def injected(saved: Saved, low_cpu_mem_usage: bool = False) -> nn.Module:
    model = saved.load_base()
    config = PeftConfig.from_pretrained(saved.adapter)
    inject_adapter_in_model(config, model, low_cpu_mem_usage=low_cpu_mem_usage)
    set_peft_model_state_dict(model, read_adapter(saved.adapter), low_cpu_mem_usage=low_cpu_mem_usage)
    return model


def injected_low_memory(saved: Saved) -> nn.Module:
    return injected(saved, low_cpu_mem_usage=True)


ROUTES = [
    peft_model,
    peft_model_low_memory,
    peft_model_trainable,
    auto_peft_model,
    auto_model_of_transformers,
    load_adapter_of_transformers,
    second_adapter,
    second_adapter_low_memory,
    over_an_existing_adapter,
    injected,
    injected_low_memory,
]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_a_reloaded_model_gives_the_same_bits(route, saved: Saved) -> None:
    assert same_bits(logits(route(saved)), saved.logits)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("budget", [{"r": 2}, {"num_deltas": 500}, {"density": 0.01}], ids=str)
def test_injection_from_a_state_dict_takes_modules_and_counts_from_it(
    saved: Saved, low_cpu_mem_usage: bool, budget: dict[str, float]
) -> None:
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in read_adapter(saved.adapter).items()}
    model = saved.load_base()
    config = spiel_config(**budget)
    inject_adapter_in_model(config, model, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=tensors)
    result = set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys
    assert same_bits(logits(model), saved.logits)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


DTYPE_ROUTES = [
    lambda saved, base: PeftModel.from_pretrained(base, saved.adapter),
    lambda saved, base: PeftModel.from_pretrained(base, saved.adapter, low_cpu_mem_usage=True),
    lambda saved, base: base.load_adapter(saved.adapter),
    lambda saved, base: set_peft_model_state_dict(
        inject_adapter_in_model(PeftConfig.from_pretrained(saved.adapter), base), read_adapter(saved.adapter)
    ),
]


@pytest.mark.parametrize("route", DTYPE_ROUTES, ids=["peft", "low_memory", "transformers", "injected"])
def test_float32_deltas_on_a_bfloat16_base_are_never_rounded(route, saved: Saved) -> None:
    base = saved.load_base(torch.bfloat16)
    route(saved, base)
    tensors = read_adapter(saved.adapter)
    deltas = deltas_of(base)
    assert len(deltas) == 4
    for module, delta in deltas.items():
        assert same_bits(delta.values.detach(), tensors[key_of(module, "values")])
        assert same_bits(delta.indices, tensors[key_of(module, "indices")])
    assert not torch.equal(tensors[key_of(Q, "values")], tensors[key_of(Q, "values")].bfloat16().float())
    assert logits(base).dtype == torch.bfloat16


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_without_autocast_deltas_take_the_dtype_of_the_base(saved: Saved, low_cpu_mem_usage: bool) -> None:
    model = PeftModel.from_pretrained(
        saved.load_base(torch.bfloat16),
        saved.adapter,
        autocast_adapter_dtype=False,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert {delta.values.dtype for delta in deltas_of(model).values()} == {torch.bfloat16}


def test_half_precision_deltas_are_saved_and_loaded_as_such(tmp_path: Path) -> None:
    model = adapted(delta_dtype="bfloat16")
    model.save_pretrained(tmp_path)
    assert read_adapter(tmp_path)[key_of(Q, "values")].dtype == torch.bfloat16
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert deltas_of(loaded)[Q].values.dtype == torch.bfloat16
    assert same_bits(logits(loaded), logits(model))


def test_modules_to_save_travel_with_the_deltas(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["lm_head"])
    train(model)
    model.save_pretrained(tmp_path)
    assert f"{PREFIX}lm_head.weight" in read_adapter(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert same_bits(logits(loaded), logits(model))


def test_several_adapters_are_saved_into_folders_and_loaded_back(tmp_path: Path) -> None:
    model = adapted(r=1)
    model.add_adapter("other", spiel_config(r=3, seed=5, target_modules=["v_proj", "q_proj"]))
    wanted = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        wanted[name] = logits(model)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    for name, expected in wanted.items():
        loaded.set_adapter(name)
        assert same_bits(logits(loaded), expected)
    loaded.base_model.set_adapter(["default", "other"])
    assert same_bits(logits(loaded), both)
    assert not torch.equal(wanted["default"], wanted["other"])


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_trained_state_back_reproduces_the_next_steps(
    saved: Saved, tmp_path: Path, low_cpu_mem_usage: bool
) -> None:
    """Deltas, candidates and progress are restored: two copies train on alike, over a close."""
    models = [
        PeftModel.from_pretrained(
            saved.load_base(), saved.adapter, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
        )
        for _ in range(2)
    ]
    states = [deltas_of(model)[Q].state for model in models]
    assert all(state.step == 5 and state.window is not None for state in states)
    models[0].save_pretrained(tmp_path)
    reread = read_adapter(tmp_path)
    assert reread.keys() == read_adapter(saved.adapter).keys()
    assert all(same_bits(tensor, reread[key]) for key, tensor in read_adapter(saved.adapter).items())
    for model in models:
        train(model, steps=3)
    assert same_bits(logits(models[0]), logits(models[1]))
    assert not torch.equal(deltas_of(models[0])[Q].indices, reread[key_of(Q, "indices")])


def test_training_state_is_dropped_from_frozen_adapters(saved: Saved, tmp_path: Path) -> None:
    assert any("spiel_delta.spiel_progress" in key for key in read_adapter(saved.adapter))
    model = PeftModel.from_pretrained(saved.load_base(), saved.adapter)
    assert all(delta.state.step == 0 and delta.state.window is None for delta in deltas_of(model).values())
    model.save_pretrained(tmp_path)
    assert {key.rpartition(".")[2] for key in read_adapter(tmp_path)} == {"values", "indices"}


def test_a_file_without_training_state_loads_as_trainable(damaged, saved: Saved) -> None:
    def drop_state(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if ".spiel_delta.spiel_" in key]:
            del tensors[key]

    model = PeftModel.from_pretrained(saved.load_base(), damaged(drop_state), is_trainable=True)
    assert same_bits(logits(model), saved.logits)
    assert all(delta.state.step == 0 for delta in deltas_of(model).values())
    train(model, steps=1)
    assert all(delta.state.step == 1 for delta in deltas_of(model).values())


def test_training_state_is_no_part_of_the_model_state_dict(saved: Saved) -> None:
    trained = PeftModel.from_pretrained(saved.load_base(), saved.adapter, is_trainable=True)
    frozen = PeftModel.from_pretrained(saved.load_base(), saved.adapter)
    assert snapshot(trained).keys() == snapshot(frozen).keys()
    assert any("spiel_progress" in key for key in get_peft_model_state_dict(trained))


def test_transformers_adds_sets_disables_and_deletes_adapters(saved: Saved) -> None:
    model = saved.load_base()
    plain = logits(model)
    model.load_adapter(saved.adapter, adapter_name="loaded")
    model.add_adapter(spiel_config(seed=3), adapter_name="added")
    assert model.active_adapters() == ["added"]
    added = logits(model)
    model.set_adapter("loaded")
    assert same_bits(logits(model), saved.logits)
    assert not torch.equal(added, saved.logits)
    model.disable_adapters()
    assert same_bits(logits(model), plain)
    model.enable_adapters()
    model.delete_adapter("added")
    assert list(model.peft_config) == ["loaded"]
    assert same_bits(logits(model), saved.logits)
    state = model.get_adapter_state_dict("loaded")
    assert {key.rpartition(".")[2] for key in state} == {"values", "indices"}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save.default.weight"),
        ({"bias": "all"}, "k_proj.bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_tokens_delta.default"),
        ({}, "q_proj.spiel_delta.default.values"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_training_has_ruined_is_not_saved(tmp_path: Path, fields: dict, name: str, value: float) -> None:
    """Such a file could not be loaded, and would take the place of a good one."""
    model = adapted(tiny_llama(attention_bias=True), **fields)
    model.save_pretrained(tmp_path)
    good = (tmp_path / FILE).read_bytes()
    ruined = [parameter for key, parameter in model.named_parameters() if key.endswith(name)]
    with torch.no_grad():
        ruined[0].view(-1)[0] = value
    with pytest.raises(ValueError, match="is not saved: 1 of its .* NaN or infinite"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_bytes() == good
