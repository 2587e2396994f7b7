"""Targets that cannot be adapted are refused by name, and a failed injection leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from support.adapters import adapted, assert_unchanged, deltas_of, layers_of, snapshot, spiel_config
from support.models import logits, tiny_llama
from support.tensors import same_bits
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from spiel_peft.layers import SpIELLayer

NORM = r"model\.layers\.0\.input_layernorm \(transformers\..*LlamaRMSNorm\) is not a supported layer"
REFUSALS = {
    "nothing matches": ({"target_modules": ["nothing"]}, r"Target modules \{'nothing'\} not found in the base model"),
    "everything excluded": (
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        "No modules were targeted for adaptation",
    ),
    "only unsupported": (
        {"target_modules": ["input_layernorm"]},
        f"cannot adapt: {NORM}.*Supported are torch.nn.Linear",
    ),
    "partly unsupported": ({"target_modules": ["q_proj", "input_layernorm"]}, f"cannot adapt: {NORM}"),
    "a regex too wide": ({"target_modules": r".*layers\.0\.(self_attn\.q_proj|.*norm)"}, f"cannot adapt: {NORM}"),
    "a container": ({"target_modules": ["mlp"]}, r"model\.layers\.0\.mlp \(.*LlamaMLP\) is not a supported layer"),
    "a token without a row": ({"trainable_token_indices": [1, 40]}, "names row 40 of the input embedding.*40 rows"),
    "a token without a row, by name": (
        {"trainable_token_indices": {"embed_tokens": [40]}},
        "names row 40 of model.embed_tokens, which has 40 rows",
    ),
    "a total too small": ({"num_deltas": 2}, "num_deltas=2 does not fit"),
}
refusals = pytest.mark.parametrize(("fields", "message"), REFUSALS.values(), ids=REFUSALS)


def traits(model: nn.Module) -> dict[str, Any]:
    """The state of a model that an injection could change."""
    return {
        "types": {name: type(module) for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "config": list(getattr(model, "peft_config", {})),
        "active": [(m.module_name, m.active_adapters) for m in layers_of(model)],
    }


@refusals
def test_a_plain_model_stays_plain(fields: dict[str, Any], message: str) -> None:
    model = tiny_llama().train()
    model.model.embed_tokens.weight.requires_grad = False
    before, state = traits(model), snapshot(model)
    for attempt in (get_peft_model, lambda base, config: inject_adapter_in_model(config, base)):
        with pytest.raises(ValueError, match=message):
            attempt(model, spiel_config(**fields))
        assert traits(model) == before
        assert_unchanged(model, state)


@refusals
def test_an_adapted_model_keeps_what_it_has(fields: dict[str, Any], message: str) -> None:
    model = adapted(target_modules=["v_proj"]).train()
    before, state = traits(model), snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", spiel_config(**fields))
    assert traits(model) == before
    assert_unchanged(model, state)


def test_long_lists_of_problems_are_cut_short() -> None:
    with pytest.raises(ValueError, match=r"and 12 more\. Supported are"):
        adapted(tiny_llama(num_hidden_layers=10), target_modules=r".*layernorm")


@pytest.fixture
def failing_third_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SpIELLayer] = []
    update_layer = SpIELLayer.update_layer

    def update(self: SpIELLayer, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        if len(made) == 3:
            raise OSError("out of memory")
        update_layer(self, *args, **kwargs)

    monkeypatch.setattr(SpIELLayer, "update_layer", update)


def by_get_peft_model(model: nn.Module) -> None:
    get_peft_model(model, spiel_config(), adapter_name="second")


def by_injection(model: nn.Module) -> None:
    inject_adapter_in_model(spiel_config(), model, "second")


def by_add_adapter(model: PeftModel) -> None:
    model.add_adapter("second", spiel_config(modules_to_save=["lm_head"], bias="all"))


def by_replacing(model: PeftModel) -> None:
    inject_adapter_in_model(spiel_config(r=1), model.get_base_model(), "default")


ATTEMPTS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], None]]] = {
    "get_peft_model": (tiny_llama, by_get_peft_model),
    "injection": (tiny_llama, by_injection),
    "a second injection": (lambda: inject_adapter_in_model(spiel_config(r=1), tiny_llama()).eval(), by_injection),
    "add_adapter": (lambda: adapted(target_modules=["q_proj", "v_proj"]), by_add_adapter),
    "replacing an adapter": (adapted, by_replacing),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_an_exception_in_the_third_layer_leaves_no_trace(attempt: str, request: pytest.FixtureRequest) -> None:
    make, add = ATTEMPTS[attempt]
    model = make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = parameter.requires_grad or "down_proj" in name
    before, state, output = traits(model), snapshot(model), logits(model)
    objects = {name: id(p) for name, p in model.named_parameters()}
    request.getfixturevalue("failing_third_layer")
    with pytest.raises(OSError, match="out of memory"):
        add(model)
    assert traits(model) == before
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert_unchanged(model, state)
    assert same_bits(logits(model), output)
    if attempt == "replacing an adapter":
        assert model.peft_config["default"].r == 2


def test_a_failure_in_peft_s_own_last_steps_leaves_no_trace_either() -> None:
    """PEFT wraps modules_to_save and tokens after all layers are in place."""
    model = adapted(target_modules=["v_proj"])
    before, state = traits(model), snapshot(model)
    config = spiel_config(modules_to_save=["lm_head"], trainable_token_indices={"q_proj": [1]})
    with pytest.raises((TypeError, ValueError)):
        model.add_adapter("second", config)
    assert traits(model) == before
    assert_unchanged(model, state)


def test_fused_experts_are_warned_about_by_name() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=40, num_key_value_heads=2, num_local_experts=2, **shape)
    with pytest.warns(UserWarning, match="fused expert parameters.*frozen") as record:
        model = adapted(MixtralForCausalLM(config), target_modules="all-linear")
    warning = next(str(w.message) for w in record if "fused" in str(w.message))
    assert "model.layers.0.mlp.experts.gate_up_proj, model.layers.0.mlp.experts.down_proj" in warning
    assert {name.rpartition(".")[2] for name in deltas_of(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
