"""Several adapters active at once, any of them frozen: outputs, gradients, cycles, saving, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.adapters import (
    adapted,
    assert_unchanged,
    deltas_of,
    key_of,
    layers_of,
    read_adapter,
    snapshot,
    spiel_config,
    train,
)
from support.models import IDS, logits, tiny_llama
from support.trainer_runs import QUIET
from torch import nn
from transformers import Trainer, TrainingArguments

from spiel_peft import KeepActive, activate

from .helpers import LANGUAGE, TASK, dense_deltas, plain_with, two_adapters

BOTH = [LANGUAGE, TASK]


def trainable(model: nn.Module) -> set[str]:
    return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_active_equal_the_dense_sum_and_merging_changes_no_bit(dtype: torch.dtype) -> None:
    model = two_adapters(tiny_llama(dtype=dtype))
    assert activate(model, BOTH) == BOTH
    both = logits(model)
    dense = plain_with([dense_deltas(model, name) for name in BOTH], tiny_llama(dtype=dtype))
    assert torch.allclose(both, logits(dense), atol=1e-5 if dtype == torch.float32 else 1e-12)
    model.merge_adapter()
    assert torch.equal(logits(model), both)
    model.unmerge_adapter()
    assert torch.equal(logits(model), both)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama(dtype=dtype)))
    assert torch.equal(logits(model.merge_and_unload()), both)


def test_where_no_position_is_shared_the_sum_is_exact_to_the_bit() -> None:
    model = two_adapters()
    # The adapters change different modules: no entry has two deltas, so the order of the sum does not matter.
    model.delete_adapter(TASK)
    model.add_adapter(TASK, spiel_config(target_modules=["up_proj"]))
    activate(model, BOTH)
    assert torch.equal(logits(model), logits(plain_with([dense_deltas(model, name) for name in BOTH])))


def test_only_what_is_named_is_trained_and_nothing_else_moves() -> None:
    model = two_adapters(regrow_every=3, accumulation_steps=2, total_steps=6)
    base = {layer.module_name: layer.get_base_weight().clone() for layer in layers_of(model)}
    language = {name: (d.indices.clone(), d.values.clone()) for name, d in deltas_of(model, LANGUAGE).items()}
    task = {name: delta.indices.clone() for name, delta in deltas_of(model, TASK).items()}
    assert activate(model, BOTH, train=[TASK]) == [TASK, LANGUAGE]
    assert trainable(model) == {TASK} and model.active_adapters == [TASK, LANGUAGE]
    optimizer = train(model, steps=4)
    assert {id(p) for p in optimizer.state} == {id(d.values) for d in deltas_of(model, TASK).values()}
    for name, delta in deltas_of(model, LANGUAGE).items():
        assert torch.equal(delta.indices, language[name][0]) and torch.equal(delta.values, language[name][1])
        assert delta.state.step == 0 and delta.values.grad is None
    assert all(delta.state.step == 4 for delta in deltas_of(model, TASK).values())
    assert any(not torch.equal(delta.indices, task[name]) for name, delta in deltas_of(model, TASK).items())
    for layer in layers_of(model):
        assert torch.equal(layer.get_base_weight(), base[layer.module_name])


def test_gradients_are_those_of_the_task_on_top_of_the_language() -> None:
    """Gradients of a plain model whose weights hold both adapters, at the task's positions."""
    model = two_adapters(tiny_llama(dtype=torch.float64), growth="none")
    activate(model, BOTH, train=[TASK])
    model.train()
    model(IDS, labels=IDS).loss.backward()
    dense = plain_with([dense_deltas(model, name) for name in BOTH], tiny_llama(dtype=torch.float64))
    dense(IDS, labels=IDS).loss.backward()
    for name, delta in deltas_of(model, TASK).items():
        expected = dense.get_submodule(name).weight.grad.flatten()[delta.indices.long()]
        assert torch.allclose(delta.values.grad, expected, atol=1e-10)


def test_two_trained_adapters_each_run_their_own_cycle() -> None:
    model = two_adapters(regrow_every=3, accumulation_steps=2, total_steps=6)
    activate(model, BOTH, train=BOTH)
    assert trainable(model) == set(BOTH)
    train(model, steps=3)
    for name in BOTH:
        assert [report.step for report in model.base_model.cycle_log(name)] == [2]


def test_everything_can_be_frozen_or_switched_back_to_one() -> None:
    model = two_adapters()
    activate(model, BOTH)
    assert trainable(model) == set()
    assert activate(model, [TASK], train=[TASK]) == [TASK] and model.active_adapter == TASK
    assert trainable(model) == {TASK}
    model.set_adapter(LANGUAGE)
    assert trainable(model) == {LANGUAGE} and model.active_adapters == [LANGUAGE]


def test_both_are_saved_and_loaded_to_the_same_outputs(tmp_path: Path) -> None:
    model = two_adapters()
    activate(model, BOTH, train=[TASK])
    train(model, steps=2)
    activate(model, BOTH)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / LANGUAGE, adapter_name=LANGUAGE)
    loaded.load_adapter(tmp_path / TASK, TASK)
    activate(loaded, BOTH)
    assert torch.equal(logits(loaded), expected)


def test_an_adapter_loaded_for_inference_saves_its_training_state_once_it_is_trained(tmp_path: Path) -> None:
    two_adapters().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / LANGUAGE, adapter_name=LANGUAGE)
    model.load_adapter(tmp_path / TASK, TASK)
    activate(model, BOTH, train=[TASK])
    train(model, steps=1)
    model.save_pretrained(tmp_path / "again")
    has_state = {
        name: any(key.endswith("spiel_progress") for key in read_adapter(tmp_path / "again" / name)) for name in BOTH
    }
    assert has_state == {LANGUAGE: False, TASK: True}


def test_wrapped_and_compiled_models_are_looked_into() -> None:
    model = two_adapters()
    activate(torch.compile(model, backend="eager"), BOTH, train=[TASK])
    assert model.active_adapters == [TASK, LANGUAGE] and model.active_adapter == TASK


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 40, (16, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(model: PeftModel, folder: Path, steps: int) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=3, learning_rate=0.02, **{**QUIET, "save_strategy": "steps"}
    )
    return Trainer(model=model, args=args, train_dataset=rows(), callbacks=[KeepActive(BOTH, train=[TASK])])


def test_a_resumed_trainer_goes_on_with_both_and_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    cycle = {"regrow_every": 3, "accumulation_steps": 2}
    whole = two_adapters(**cycle)
    activate(whole, BOTH, train=[TASK])
    trainer_of(whole, tmp_path, 6).train()
    resumed = two_adapters(**cycle)
    activate(resumed, BOTH, train=[TASK])
    trainer_of(resumed, tmp_path, 6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.active_adapters == [TASK, LANGUAGE] and trainable(resumed) == {TASK}
    assert_unchanged(resumed, snapshot(whole))


def test_the_best_checkpoint_is_found_under_the_name_default_and_both_stay_active(tmp_path: Path) -> None:
    model = adapted(adapter=LANGUAGE, density=0.2, seed=11)
    model.add_adapter("default", spiel_config(density=0.2, seed=5))
    active = activate(model, [LANGUAGE, "default"], train=["default"])
    settings = {**QUIET, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    # The loss falls, so the first checkpoint is the best by this measure.
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=3, learning_rate=0.02, **settings)
    trainer = Trainer(model=model, args=args, train_dataset=rows(), eval_dataset=rows()[:4])
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1" and model.active_adapters == active == ["default", LANGUAGE]
    for name, delta in deltas_of(model).items():
        assert torch.equal(delta.values, read_adapter(best)[key_of(name, "values")])


def test_modules_saved_in_full_exclude_each_other_before_anything_changes() -> None:
    model = two_adapters(modules_to_save=["lm_head"])
    before, trained = model.active_adapters, trainable(model)
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        activate(model, BOTH, train=[TASK])
    assert model.active_adapters == before and trainable(model) == trained
    model.add_adapter("plain", spiel_config(seed=8))
    activate(model, ["plain", TASK], train=[TASK])
    head = model.base_model.model.lm_head
    assert head.active_adapters == [TASK] and head.modules_to_save[TASK].weight.requires_grad
    assert not head.modules_to_save[LANGUAGE].weight.requires_grad


@pytest.mark.parametrize(
    ("adapters", "trained", "message"),
    [
        ([LANGUAGE, "gone"], [], r"Adapters \['gone'\] do not exist; there are \['language', 'task'\]"),
        ([LANGUAGE], [TASK], r"train names \['task'\], which are not in adapters"),
        ([LANGUAGE, LANGUAGE], [], "more than once"),
        ([], [], "adapters is empty"),
        (LANGUAGE, [], "adapters must be a list of adapter names"),
        ([LANGUAGE], LANGUAGE, "train must be a list of adapter names"),
    ],
)
def test_wrong_names_change_nothing(adapters: Any, trained: Any, message: str) -> None:
    model = two_adapters()
    with pytest.raises(ValueError, match=message):
        activate(model, adapters, train=trained)
    assert model.active_adapters == [LANGUAGE] and trainable(model) == {LANGUAGE}


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="model must be a PeftModel with adapters.*got LlamaForCausalLM"):
        activate(tiny_llama(), ["default"])
