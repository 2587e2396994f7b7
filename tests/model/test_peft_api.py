"""PEFT's functions and methods work with SpIEL as they do with LoRA."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_model_status, get_peft_model, get_peft_model_state_dict
from support.adapters import PREFIX, adapted, assert_unchanged, deltas_of, layers_of, snapshot, spiel_config, train
from support.models import IDS, logits, tiny_llama
from support.tensors import same_bits, texts
from transformers import AutoModelForCausalLM

from spiel_peft import SpIELConfig

Q0 = "model.layers.0.self_attn.q_proj"
# Drawn once; a change would give resumed runs and other ranks other positions.
POSITIONS = [6, 17, 22, 23, 29, 44, 45, 50, 69, 74, 96, 102, 105, 108, 126, 131]
POSITIONS += [134, 146, 166, 169, 173, 179, 180, 183, 197, 205, 210, 211, 226, 235, 241, 245]


def lora(model: torch.nn.Module, **fields: object) -> PeftModel:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **fields)
    return get_peft_model(model, config)


# --- making a model ---


@pytest.mark.parametrize("make", [lora, adapted], ids=["lora", "spiel"])
def test_get_peft_model_twice_warns(make) -> None:
    with pytest.warns(UserWarning) as record:
        make(make(tiny_llama()).get_base_model())
    assert "for a second time" in texts(record)
    assert "Already found a `peft_config` attribute" in texts(record)


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    model.print_trainable_parameters()
    base = sum(p.numel() for p in tiny_llama().parameters())
    trained = 2 * 2 * (16 + 16) + 2 * 2 * (16 + 24)
    expected = f"trainable params: {trained:,} || all params: {base + trained:,} || "
    assert capsys.readouterr().out.startswith(expected + f"trainable%: {100 * trained / (base + trained):.4f}")


def test_a_fresh_adapter_is_an_identity_and_disabling_gives_the_base_model() -> None:
    plain = logits(tiny_llama())
    fresh = adapted(init_weights=True)
    assert same_bits(logits(fresh), plain)
    model = adapted()
    assert not torch.equal(logits(model), plain)
    with model.disable_adapter():
        assert same_bits(logits(model), plain)
    assert not torch.equal(logits(model), plain)


def test_only_deltas_are_trainable_and_the_base_never_moves() -> None:
    model = adapted()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{PREFIX}{module}.spiel_delta.default.values" for module in deltas_of(model)}
    train(model, steps=6)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in names)
    assert_unchanged(model.unload(), snapshot(tiny_llama()))


def test_all_linear_leaves_out_the_head_and_finds_every_layer_for_a_second_adapter() -> None:
    model = adapted(target_modules="all-linear")
    model.add_adapter("second", spiel_config(target_modules="all-linear"))
    for adapter in ("default", "second"):
        assert {name.rpartition(".")[2] for name in deltas_of(model, adapter)} == {
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        }
        assert len(deltas_of(model, adapter)) == 14


def test_the_default_targets_are_those_of_lora() -> None:
    lora_model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM"))
    model = get_peft_model(tiny_llama(), SpIELConfig(task_type="CAUSAL_LM"))
    assert model.peft_config["default"].target_modules == lora_model.peft_config["default"].target_modules


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"exclude_modules": ["layers.0.self_attn.q_proj"]},
            {"0.mlp.down_proj", "1.self_attn.q_proj", "1.mlp.down_proj"},
        ),
        ({"exclude_modules": r".*\.mlp\..*"}, {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        ({"layers_to_transform": [1]}, {"1.self_attn.q_proj", "1.mlp.down_proj"}),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, {"0.self_attn.q_proj", "0.mlp.down_proj"}),
        ({"target_modules": r"model\.layers\.1\..*_proj"}, None),
    ],
)
def test_choosing_modules(fields: dict[str, object], expected: set[str] | None) -> None:
    names = {name.removeprefix("model.layers.") for name in deltas_of(adapted(**fields))}
    expected = expected or {f"1.self_attn.{n}_proj" for n in "qkvo"} | {
        f"1.mlp.{n}_proj" for n in ("gate", "up", "down")
    }
    assert names == expected


# --- status and state dicts ---


def test_model_and_layer_status() -> None:
    model = adapted()
    model.add_adapter("other", spiel_config(target_modules=["q_proj"]))
    status = get_model_status(model)
    assert status == model.get_model_status()
    assert (status.adapter_model_type, status.peft_types) == ("SpIELModel", {"default": "SPIEL", "other": "SPIEL"})
    assert (status.num_adapter_layers, status.enabled, status.active_adapters) == (4, True, ["default"])
    assert status.trainable_params == 288
    assert status.total_params == 288 + 128 + sum(p.numel() for p in tiny_llama().parameters())
    assert status.requires_grad == {"default": True, "other": False}
    assert status.available_adapters == ["default", "other"]
    layer = model.get_layer_status()[0]
    assert (layer.name, layer.module_type) == ("model." + Q0, "spiel.SpIELLinear")
    assert layer.devices == {"default": ["cpu"], "other": ["cpu"]}
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_get_peft_model_state_dict_names_no_adapter() -> None:
    model = adapted()
    model.add_adapter("other", spiel_config(target_modules=["q_proj"]))
    state = get_peft_model_state_dict(model, adapter_name="other")
    assert state.keys() == {
        f"{PREFIX}model.layers.{i}.self_attn.q_proj.spiel_delta.{name}"
        for i in (0, 1)
        for name in ("values", "indices")
    }
    assert same_bits(state[f"{PREFIX}{Q0}.spiel_delta.values"], deltas_of(model, "other")[Q0].values.detach())


def test_the_model_card(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    for line in (f"base_model: {tmp_path / 'base'}", "library_name: peft", f"PEFT {peft.__version__}"):
        assert line in card


# --- several adapters ---


def test_adding_setting_and_deleting_adapters() -> None:
    model = adapted()
    first = logits(model)
    model.add_adapter("other", spiel_config(seed=5))
    assert same_bits(logits(model), first) and model.active_adapters == ["default"]
    model.set_adapter("other")
    second = logits(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(".other." in name for name in trainable)
    assert not torch.equal(first, second)
    model.delete_adapter("default")
    assert list(model.peft_config) == ["other"] and not deltas_of(model, "default")
    assert same_bits(logits(model), second)
    assert not any("default" in key for key in model.state_dict())


def test_two_active_adapters_add_up_and_a_frozen_one_stays() -> None:
    model = adapted()
    model.add_adapter("other", spiel_config(seed=5))
    model.base_model.set_adapter(["default", "other"])
    for delta in deltas_of(model, "default").values():
        delta.requires_grad_(False)
    dense = {}
    for layer in layers_of(model):
        dense[layer.module_name] = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    reference = tiny_llama()
    with torch.no_grad():
        for module, weight in dense.items():
            reference.get_submodule(module).weight += weight
    assert torch.allclose(logits(model), logits(reference), rtol=1e-5, atol=1e-6)
    before = snapshot(model)
    train(model, steps=2)
    moved = {key for key, tensor in model.state_dict().items() if not same_bits(tensor, before[key])}
    assert moved and all(".other." in key for key in moved)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.set_adapter("absent"), "Adapter absent not found"),
        (lambda model: model.delete_adapter("absent"), "Adapter absent does not exist"),
        (lambda model: model.add_adapter("default", spiel_config()), "'default' already exists"),
        (lambda model: model.add_adapter("other", LoraConfig()), "Cannot combine adapters with different peft types"),
        (lambda model: model(IDS, adapter_names=["default", "__base__"]), "mixed batches.*set_adapter"),
        (lambda model: model.generate(input_ids=IDS, adapter_names=["default"] * 2), "mixed batches.*set_adapter"),
    ],
)
def test_wrong_calls_name_the_problem_and_change_nothing(call, message: str) -> None:
    model = adapted()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]


# --- where deltas start ---


def test_the_reference_adapter_of_trl_equals_the_policy() -> None:
    """TRL adds the reference adapter with the same config object and copies parameters named `.default.`."""
    model = adapted()
    train(model, steps=7)  # the indices have moved by now
    model.add_adapter("ref", model.peft_config["default"])
    parameters = dict(model.named_parameters())
    copied = 0
    for name, parameter in parameters.items():
        if ".default." in name:
            parameters[name.replace(".default.", ".ref.")].data.copy_(parameter.data)
            copied += 1
    assert copied == len(deltas_of(model)) == 4
    policy = logits(model)
    model.set_adapter("ref")
    assert same_bits(logits(model), policy)


def test_the_reference_adapter_moves_on_its_own() -> None:
    model = adapted()
    model.add_adapter("ref", model.peft_config["default"])
    before = snapshot(deltas_of(model, "ref")[Q0])
    train(model, steps=7)
    assert_unchanged(deltas_of(model, "ref")[Q0], before)
    assert not same_bits(deltas_of(model)[Q0].indices, before["indices"])


def test_seeds_and_module_names_choose_the_positions() -> None:
    model = adapted()
    model.add_adapter("same_seed", spiel_config())
    model.add_adapter("other_seed", spiel_config(seed=1))
    first, same, other = (deltas_of(model, name) for name in ("default", "same_seed", "other_seed"))
    assert all(same_bits(first[module].indices, same[module].indices) for module in first)
    assert not any(torch.equal(first[module].indices, other[module].indices) for module in first)
    assert not torch.equal(first[Q0].indices, first[Q0.replace("0", "1")].indices)


def test_positions_are_the_same_in_every_process() -> None:
    assert deltas_of(adapted(r=1))[Q0].indices.tolist() == POSITIONS
    # Without the packages that take long to import.
    code = f"""
        import sys
        sys.path[:] = {sys.path!r}
        from spiel_kernels import sample_positions
        from spiel_kernels.index_set import seeded_generator
        print(sample_positions(256, 32, seeded_generator(0, {Q0!r}, 0)).tolist())
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert out.stdout.strip() == str(POSITIONS)
