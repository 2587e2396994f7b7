"""Frozen languages that take turns under a task in training: the right weights, batch by batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.adapters import deltas_of, layers_of, snapshot, spiel_config
from support.layers import adapt
from support.models import IDS, logits, tiny_llama
from torch import Tensor, nn

from spiel_peft import SM3, LanguageCycler, LanguageCyclerCallback
from spiel_peft.compose.active import language_of_batch

from .helpers import CYCLE, LANGUAGES, TASK, batches, dense_deltas, model_with_languages, plain_with


def dense_gradients(model: PeftModel, language: str | None, ids: Tensor) -> dict[str, Tensor]:
    """Gradients of the task's deltas by autograd through a plain model that holds the task and one language."""
    active = [TASK] if language is None else [TASK, language]
    plain = plain_with([dense_deltas(model, name) for name in active], tiny_llama(dtype=torch.float64))
    plain(ids, labels=ids).loss.backward()
    return {
        name: plain.get_submodule(name).weight.grad.flatten()[delta.indices.long()]
        for name, delta in deltas_of(model, TASK).items()
    }


def assert_gradients(model: PeftModel, parts: list[tuple[str | None, Tensor]]) -> None:
    """The task's gradients are the sum over these batches, each with its own language."""
    expected = [dense_gradients(model, language, ids) for language, ids in parts]
    for name, delta in deltas_of(model, TASK).items():
        assert torch.allclose(delta.values.grad, sum(each[name] for each in expected), atol=1e-10), name


def stepped(model: PeftModel) -> torch.optim.Optimizer:
    """An optimizer that has stepped the task."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def assert_equal(a: Any, b: Any) -> None:
    """Equal trees of dicts, lists and tensors."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, (list, tuple)):
        for each, other in zip(a, b, strict=True):
            assert_equal(each, other)
    else:
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


# -- the order -------------------------------------------------------------------------------------


def test_every_round_has_each_language_once_in_an_order_that_only_the_arguments_decide() -> None:
    torch.manual_seed(1)
    first = [language_of_batch(batch, LANGUAGES, seed=5) for batch in range(60)]
    torch.manual_seed(2)
    assert first == [language_of_batch(batch, LANGUAGES, seed=5) for batch in range(60)]
    rounds = [tuple(first[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(each) == sorted(LANGUAGES) for each in rounds) and len(set(rounds)) > 3
    assert first != [language_of_batch(batch, LANGUAGES, seed=6) for batch in range(60)]
    assert [language_of_batch(batch, LANGUAGES, "in_order") for batch in range(5)] == [*LANGUAGES, *LANGUAGES[:2]]


# -- gradients -------------------------------------------------------------------------------------


def test_accumulated_gradients_are_the_sum_over_the_languages_of_their_batches() -> None:
    model = model_with_languages(tiny_llama(dtype=torch.float64), growth="none")
    cycler = LanguageCycler(model, LANGUAGES, TASK)
    stepped(model)
    parts, active = [], []
    for ids in batches(4):
        language = cycler.advance()
        model(ids, labels=ids).loss.backward()
        parts.append((language, ids))
        active.append({name for layer in layers_of(model) for name in layer.active_adapters})
    assert active == [{TASK, language} for language, _ in parts]
    assert_gradients(model, parts)


def test_a_backward_pass_after_the_switch_uses_the_language_of_its_forward_pass() -> None:
    model = model_with_languages(tiny_llama(dtype=torch.float64), growth="none")
    cycler = LanguageCycler(model, LANGUAGES, TASK)
    stepped(model)
    parts, losses = [], []
    for ids in batches(3):
        parts.append((cycler.advance(), ids))
        losses.append(model(ids, labels=ids).loss)
    for loss in reversed(losses):
        loss.backward()
    assert_gradients(model, parts)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_right_in_order_and_refused_out_of_order(reentrant: bool) -> None:
    model = model_with_languages(tiny_llama(dtype=torch.float64), growth="none")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    cycler = LanguageCycler(model, LANGUAGES, TASK)
    stepped(model)
    parts = []
    for ids in batches(2):
        parts.append((cycler.advance(), ids))
        loss = model(ids, labels=ids).loss
        evaluated = cycler.language
        cycler.use("finnish")
        logits(model)
        cycler.use(evaluated)
        model.train()
        loss.backward()
    assert_gradients(model, parts)
    loss = model(IDS, labels=IDS).loss
    cycler.advance()
    with pytest.raises(
        RuntimeError, match="gradient checkpointing computes a forward pass again.*call backward before"
    ):
        loss.backward()


def test_a_switch_inside_a_backward_pass_is_refused() -> None:
    model = model_with_languages()
    cycler = LanguageCycler(model, LANGUAGES, TASK)
    out = model(IDS, labels=IDS)
    out.logits.register_hook(lambda grad: cycler.advance())
    with pytest.raises(RuntimeError, match="while a backward pass is under way"):
        out.loss.backward()


# -- what does not change --------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_of", [torch.optim.AdamW, SM3], ids=["adamw", "sm3"])
def test_training_moves_the_task_alone(optimizer_of: Callable[..., torch.optim.Optimizer]) -> None:
    model = model_with_languages(**CYCLE)
    base = {layer.module_name: layer.get_base_weight().clone() for layer in layers_of(model)}
    languages = {key: tensor for key, tensor in snapshot(model).items() if f".{TASK}." not in key}
    cycler = LanguageCycler(model, LANGUAGES, TASK, order="in_order")
    optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad], lr=0.02)
    start = {name: delta.indices.clone() for name, delta in deltas_of(model, TASK).items()}
    used = []
    for number, ids in enumerate(batches(14)):
        used.append(cycler.advance())
        model(ids, labels=ids).loss.backward()
        if number % 2:
            before = (
                copy.deepcopy(optimizer.state_dict()["state"]),
                [d.state.row for d in deltas_of(model, TASK).values()],
            )
            cycler.use(LANGUAGES[0])
            after = optimizer.state_dict()["state"], [d.state.row for d in deltas_of(model, TASK).values()]
            assert_equal(after, before)
            optimizer.step()
            optimizer.zero_grad()
    assert used == [LANGUAGES[i % 3] for i in range(14)]
    assert {id(p) for p in optimizer.state} <= {id(d.values) for d in deltas_of(model, TASK).values()}
    after = snapshot(model)
    assert all(torch.equal(after[key], tensor) for key, tensor in languages.items())
    assert all(torch.equal(layer.get_base_weight(), base[layer.module_name]) for layer in layers_of(model))
    assert any(not torch.equal(delta.indices, start[name]) for name, delta in deltas_of(model, TASK).items())
    assert len(model.base_model.cycle_log(TASK)) == 2 and model.base_model.cycle_log(LANGUAGES[0]) == []


def test_outputs_are_those_of_the_task_and_one_language_or_none() -> None:
    model = model_with_languages(tiny_llama(dtype=torch.float64))
    cycler = LanguageCycler(model, LANGUAGES, [TASK])
    for language in (*LANGUAGES, None):
        cycler.use(language)
        active = [TASK] if language is None else [TASK, language]
        assert model.active_adapters == active
        dense = plain_with([dense_deltas(model, name) for name in active], tiny_llama(dtype=torch.float64))
        assert torch.allclose(logits(model), logits(dense), atol=1e-12)


def test_a_compiled_layer_follows_the_switches() -> None:
    model = adapt(nn.Linear(6, 5), adapters=("german", "spanish", TASK)).train()
    cycler = LanguageCycler(model, LANGUAGES[:2], TASK, order="in_order")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(3, 6)
    for _ in range(4):
        language = cycler.advance()
        weight = model.base_model.model.layer.get_base_weight()
        weight = weight + sum(dense_deltas(model, name)["layer"] for name in (TASK, language)).float()
        expected = nn.functional.linear(x, weight, model.base_model.model.layer.base_layer.bias)
        assert torch.allclose(compiled(x), expected, atol=1e-6)
    torch._dynamo.reset()


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"languages": [*LANGUAGES, TASK]}, r"\['task'\] are both in languages and in task"),
        ({"languages": ["german", "klingon"]}, r"Adapters \['klingon'\] do not exist"),
        ({"languages": []}, "languages is empty"),
        ({"languages": "german"}, "languages must be a list"),
        ({"languages": ["german", "german"]}, "languages names .* more than once"),
        ({"task": []}, "task is empty"),
        ({"task": "other"}, r"Adapters \['other'\] do not exist"),
        ({"order": "random"}, "`order` must be one of 'shuffled', 'in_order'"),
        ({"seed": -1}, "`seed` must be an integer of at least 0"),
    ],
)
def test_wrong_arguments_change_nothing(arguments: dict[str, Any], message: str) -> None:
    model = model_with_languages()
    with pytest.raises(ValueError, match=message):
        LanguageCycler(model, **{"languages": LANGUAGES, "task": TASK, **arguments})
    assert model.active_adapters == [LANGUAGES[0]]


def test_merged_models_and_languages_with_whole_modules_are_refused() -> None:
    model = model_with_languages()
    model.add_adapter("full", spiel_config(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"Adapters \['full'\] have saved whole modules"):
        LanguageCycler(model, ["german", "full"], TASK)
    cycler = LanguageCycler(model, LANGUAGES, "full")
    with pytest.raises(ValueError, match="do not exist"):
        LanguageCyclerCallback(cycler, evaluate_with="klingon")
    with pytest.raises(ValueError, match="`batch` must be an integer"):
        cycler.go_to(-1)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="while adapters are merged; call unmerge_adapter"):
        cycler.advance()
    with pytest.raises(ValueError, match="cannot be trained while .* are merged"):
        LanguageCycler(model, LANGUAGES, TASK)
