"""`add_weighted_adapter`: the new adapter is exact, saved and loaded like any other, and errors change nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from support.adapters import (
    adapted,
    assert_unchanged,
    deltas_of,
    layers_of,
    read_adapter,
    snapshot,
    spiel_config,
    train,
)
from support.layers import CASES, adapt
from support.models import logits, tiny_llama
from support.quantized import COLS, QUANTIZED
from support.tensors import assert_close
from transformers import AutoModelForCausalLM

from spiel_kernels import check_index_set
from spiel_peft import SpIELModel, activate
from spiel_peft.compose.rules import Combination, combine_deltas

from .helpers import LANGUAGE, TASK, dense_deltas, plain_with, two_adapters

BOTH = [LANGUAGE, TASK]


def flags(model: PeftModel) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, -2.0]])
def test_linear_is_the_weighted_sum_of_the_dense_deltas(weights: list[float]) -> None:
    model = two_adapters()
    report = model.add_weighted_adapter(BOTH, weights, "sum")
    language, task, got = (dense_deltas(model, name) for name in (*BOTH, "sum"))
    assert set(got) == set(language) | set(task) == set(report.modules)
    for name, delta in got.items():
        zero = torch.zeros_like(delta)
        expected = weights[0] * language.get(name, zero) + weights[1] * task.get(name, zero)
        assert torch.equal(delta.float(), expected.float())
    for delta in deltas_of(model, "sum").values():
        assert check_index_set(delta.indices, delta.numel) is None and not delta.untouched
    scaled = [{n: w * d for n, d in deltas.items()} for w, deltas in zip(weights, (language, task), strict=True)]
    model.set_adapter("sum")
    assert torch.allclose(logits(model), logits(plain_with(scaled)), atol=1e-5)


@pytest.mark.parametrize("kind", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_every_type_gives_what_the_pure_function_gives(kind: str) -> None:
    model = two_adapters()
    model.add_weighted_adapter(BOTH, [1.0, 0.5], "mix", kind, density=0.5, majority_sign_method="frequency", seed=3)
    how = Combination((1.0, 0.5), kind, 0.5, "frequency", 3)
    held = {name: deltas_of(model, name) for name in BOTH}
    for module, delta in deltas_of(model, "mix").items():
        pairs = [held[name][module]() if module in held[name] else None for name in BOTH]
        indices, values = combine_deltas(pairs, how, module)
        assert torch.equal(delta.indices, indices) and torch.equal(delta.values, values)
    model.set_adapter("mix")
    assert not torch.equal(logits(model), logits(tiny_llama()))


def test_it_is_saved_loaded_and_merged_like_any_other(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = two_adapters(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.add_weighted_adapter(BOTH, [0.7, 0.3], "mix", "ties", density=0.5)
    model.set_adapter("mix")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "mix")
    assert torch.equal(logits(loaded), expected)
    assert loaded.peft_config["default"].num_deltas == {name: d.k for name, d in deltas_of(model, "mix").items()}
    merged = loaded.merge_and_unload(safe_merge=True)
    assert torch.equal(logits(merged), expected)


def test_many_modules_whose_names_peft_shortens(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": "all-linear", "r": 1}
    model = adapted(tiny_llama(num_hidden_layers=4), adapter="a", **fields)
    model.add_adapter("b", spiel_config(seed=4, **fields))
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "mix", "dare_linear", density=0.9)
    model.set_adapter("mix")
    assert len(deltas_of(model, "mix")) == 28
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    loaded = PeftModel.from_pretrained(tiny_llama(num_hidden_layers=4), tmp_path / "mix")
    assert torch.equal(logits(loaded), logits(model))


def test_it_can_be_trained_and_its_training_state_is_saved(tmp_path: Path) -> None:
    model = two_adapters(regrow_every=4, accumulation_steps=2, total_steps=8)
    model.add_weighted_adapter(BOTH, [1.0, 1.0], "mix")
    model.set_adapter("mix")
    before = {name: delta.indices.clone() for name, delta in deltas_of(model, "mix").items()}
    others = [dense_deltas(model, name) for name in BOTH]
    train(model, steps=3)
    # The run began with deltas that are not zero: the first close replaces a share of them, not all.
    kept = [torch.isin(d.indices, before[n]).float().mean() for n, d in deltas_of(model, "mix").items()]
    assert 0.5 < float(torch.stack(kept).mean()) < 1
    for now, then in zip((dense_deltas(model, name) for name in BOTH), others, strict=True):
        assert all(torch.equal(now[name], then[name]) for name in then)
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    assert any(key.endswith("spiel_progress") for key in read_adapter(tmp_path / "mix"))


@pytest.mark.parametrize("name", ["mix", "mlp"], ids=["any-name", "name-of-a-module"])
def test_what_is_active_and_in_training_stays_so_and_no_random_number_is_drawn(name: str) -> None:
    model = two_adapters()
    activate(model, BOTH, train=[TASK])
    before, rng = flags(model), torch.get_rng_state()
    model.add_weighted_adapter(BOTH, [1.0, 1.0], name, "dare_linear", density=0.5)
    assert torch.equal(torch.get_rng_state(), rng)
    after = flags(model)
    assert {key: after[key] for key in before} == before
    assert not any(flag for key, flag in after.items() if key not in before)
    assert model.active_adapters == [TASK, LANGUAGE]
    assert {key for key, flag in after.items() if flag} == {key for key in before if ".task.values" in key}


def test_one_adapter_can_be_scaled_negated_or_pruned() -> None:
    model = two_adapters()
    model.add_weighted_adapter([TASK], [-1.0], "forget")
    model.add_weighted_adapter([TASK], [1.0], "pruned", "magnitude_prune", density=0.25)
    task, forget = dense_deltas(model, TASK), dense_deltas(model, "forget")
    assert all(torch.equal(forget[name], -task[name]) for name in task)
    counts = {name: (delta.k, deltas_of(model, "pruned")[name].k) for name, delta in deltas_of(model, TASK).items()}
    assert all(abs(after - before / 4) <= 0.5 for before, after in counts.values())
    # The sum of an adapter and its negation is the base model.
    model.add_weighted_adapter([TASK, "forget"], [1.0, 1.0], "nothing")
    model.set_adapter("nothing")
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_half_precision_deltas_keep_their_setting() -> None:
    model = two_adapters(delta_dtype="bfloat16")
    model.add_weighted_adapter(BOTH, [1.0, 1.0], "mix")
    assert model.peft_config["mix"].delta_dtype == "bfloat16"
    assert {delta.values.dtype for delta in deltas_of(model, "mix").values()} == {torch.bfloat16}


def test_half_precision_base_gives_float32_deltas() -> None:
    model = two_adapters(tiny_llama(dtype=torch.bfloat16))
    model.add_weighted_adapter(BOTH, [1.0, 1 / 3], "mix")
    language, task, got = (dense_deltas(model, name) for name in (*BOTH, "mix"))
    for name, delta in got.items():
        zero = torch.zeros_like(delta)
        expected = language.get(name, zero) + task.get(name, zero) / 3
        assert torch.equal(delta, expected.float().double())


@pytest.mark.parametrize("kind", ["transposed", "embedding", "conv2d-groups", "4bit", "8bit"])
def test_every_kind_of_layer(kind: str) -> None:
    if kind in CASES:
        layer, x = CASES[kind].build()
    else:
        layer, x = QUANTIZED["nf4" if kind == "4bit" else kind](), torch.randn(3, COLS)
    model = adapt(layer, k=20, adapters=("a", "b")).eval()
    activate(model, ["a", "b"])
    with torch.no_grad():
        both = model(x)
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "mix")
        model.set_adapter("mix")
        assert_close(model(x), both, 1e-5)
        with model.disable_adapter():
            assert not torch.equal(model(x), both)


def test_tied_weights_share_the_combined_delta(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "density": 0.1}
    model = adapted(tiny_llama(tied=True), adapter="a", **fields)
    model.add_adapter("b", spiel_config(seed=4, **fields))
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "mix")
    model.set_adapter("mix")
    assert len({id(layer.spiel_delta["mix"]) for layer in layers_of(model)}) == 1 and len(layers_of(model)) == 2
    base = tiny_llama(tied=True)
    with torch.no_grad():
        a, b = (dense_deltas(model, name).popitem()[1] for name in "ab")
        base.model.embed_tokens.weight += (a + 0.5 * b).float()
    assert torch.allclose(logits(model), logits(base), atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    loaded = PeftModel.from_pretrained(tiny_llama(tied=True), tmp_path / "mix")
    assert torch.equal(logits(loaded), logits(model))
    model.add_adapter("untied", spiel_config(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="ensure_weight_tying differs between the adapters"):
        model.add_weighted_adapter(["a", "untied"], [1.0, 1.0], "wrong")


@pytest.mark.parametrize(
    "extra", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 5]}], ids=["module", "tokens"]
)
def test_what_one_adapter_saved_in_full_is_taken_over(extra: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(adapter="plain")
    model.add_adapter("full", spiel_config(seed=3, **extra))
    model.set_adapter("full")
    train(model, steps=2)
    expected = plain_with([dense_deltas(model, "full"), dense_deltas(model, "plain")])
    state = read_saved(model, "full", tmp_path)
    for key, tensor in state.items():
        target = expected.get_parameter(key.replace("token_adapter.trainable_tokens_delta", "weight"))
        with torch.no_grad():
            if "token_adapter" in key:
                target[[1, 5]] = tensor
            else:
                target.copy_(tensor)
    model.add_weighted_adapter(["plain", "full"], [1.0, 1.0], "mix")
    model.set_adapter("mix")
    assert torch.allclose(logits(model), logits(expected), atol=1e-5)
    model.save_pretrained(tmp_path / "saved", selected_adapters=["mix"])
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved" / "mix")
    assert torch.equal(logits(loaded), logits(model))
    model.add_adapter("also", spiel_config(seed=4, **extra))
    before = snapshot(model)
    with pytest.raises(ValueError, match="'full', 'also'.*cannot be combined: each has trained"):
        model.add_weighted_adapter(["full", "also"], [1.0, 1.0], "wrong")
    assert_unchanged(model, before)


def read_saved(model: PeftModel, adapter: str, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter besides its deltas, by key in the base model."""
    model.save_pretrained(folder / "full", selected_adapters=[adapter])
    tensors = read_adapter(folder / "full" / adapter)
    return {key.removeprefix("base_model.model."): t for key, t in tensors.items() if "spiel_delta" not in key}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapters": [LANGUAGE, "gone"]}, r"Adapters \['gone'\] do not exist; there are \['language', 'task'\]"),
        ({"adapters": [TASK, TASK]}, r"adapters names \['task'\] more than once"),
        ({"adapters": TASK}, "adapters must be a list"),
        ({"adapters": [], "weights": []}, "adapters is empty"),
        ({"weights": [1.0]}, "weights has 1 entries for 2 adapters"),
        ({"weights": [1.0, float("inf")]}, "weights must be finite numbers.*inf"),
        ({"weights": [1e300, 1e300]}, "combined deltas are not finite"),
        ({"adapter_name": TASK}, "adapter_name='task' exists already"),
        ({"adapter_name": ""}, "adapter_name must be a non-empty string"),
        ({"combination_type": "svd"}, "low-rank factors"),
        ({"adapters": [TASK], "weights": [0.0], "drop_zeros": True}, "nothing is left of these adapters"),
    ],
)
def test_errors_change_nothing(arguments: dict[str, Any], message: str) -> None:
    model = two_adapters()
    activate(model, BOTH, train=[TASK])
    before, states = snapshot(model), flags(model)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**{"adapters": BOTH, "weights": [1.0, 1.0], "adapter_name": "new", **arguments})
    assert_unchanged(model, before)
    assert flags(model) == states and set(model.peft_config) == set(BOTH) and model.active_adapters == [TASK, LANGUAGE]


def test_a_failure_while_the_adapter_is_added_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_adapters()
    activate(model, BOTH, train=[TASK])
    before, states = snapshot(model), flags(model)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(SpIELModel, "_replace_module", fail)
    monkeypatch.setattr("spiel_peft.layers.base.SparseDelta", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        model.add_weighted_adapter(BOTH, [1.0, 1.0], "new")
    assert_unchanged(model, before)
    assert flags(model) == states and set(model.peft_config) == set(BOTH)


def test_merged_adapters_and_trained_biases_are_refused() -> None:
    model = two_adapters()
    model.merge_adapter([LANGUAGE])
    with pytest.raises(ValueError, match=r"cannot be combined while \['language'\] are merged"):
        model.add_weighted_adapter(BOTH, [1.0, 1.0], "new")
    model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        biased = adapted(adapter="biased", bias="all")
    biased.add_adapter("plain", spiel_config())
    with pytest.raises(ValueError, match="'biased' was trained with bias='all'"):
        biased.add_weighted_adapter(["biased", "plain"], [1.0, 1.0], "new")
    assert set(biased.peft_config) == {"biased", "plain"}


def test_an_adapter_of_another_method_is_named() -> None:
    model = two_adapters()
    model.base_model.peft_config["lora"] = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="Adapter 'lora' is not a SpIEL adapter: its peft_type is 'LORA'"):
        model.add_weighted_adapter([LANGUAGE, "lora"], [1.0, 1.0], "new")
