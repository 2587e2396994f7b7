"""Languages that take turns: in transformers' Trainer, and in runs that are stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.adapters import snapshot, spiel_config
from support.trainer_runs import QUIET
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from spiel_peft import LanguageCycler, LanguageCyclerCallback
from spiel_peft.compose.active import language_of_batch

from .helpers import CYCLE, LANGUAGES, TASK, batches, model_with_languages


def test_a_loop_resumes_with_the_next_language() -> None:
    model = model_with_languages()
    cycler = LanguageCycler(model, LANGUAGES, TASK, seed=2)
    whole = [cycler.advance() for _ in range(9)]
    again = LanguageCycler(model, LANGUAGES, TASK, seed=2)
    assert [again.advance() for _ in range(4)] == whole[:4]
    state = again.state_dict()
    resumed = LanguageCycler(model, LANGUAGES, TASK, seed=2)
    resumed.load_state_dict(state)
    assert resumed.language == whole[3] and model.active_adapters == [TASK, whole[3]]
    assert [resumed.advance() for _ in range(5)] == whole[4:]
    assert resumed.go_to(1) == whole[1] and model.active_adapters == [TASK, whole[1]]
    fresh = LanguageCycler(model, LANGUAGES, TASK, seed=2)
    fresh.load_state_dict(LanguageCycler(model, LANGUAGES, TASK, seed=2).state_dict())
    assert fresh.advance() == whole[0]
    with pytest.raises(ValueError, match="the saved state has seed=2, this cycler 3"):
        LanguageCycler(model, LANGUAGES, TASK, seed=3).load_state_dict(state)


class Record(TrainerCallback):
    """The languages of all training and evaluation passes, by the name of the active adapter."""

    def __init__(self, model: PeftModel) -> None:
        self.train: list[str] = []
        self.evaluation: list[str] = []
        model.register_forward_pre_hook(self._note)

    def _note(self, model: nn.Module, inputs: Any) -> None:
        (self.train if model.training else self.evaluation).append(model.active_adapters[-1])


def trainer_of(model: PeftModel, folder: Path, **settings: Any) -> tuple[Trainer, Record]:
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.cat(batches(12))]
    record = Record(model)
    cycler = LanguageCycler(model, LANGUAGES, TASK, seed=4)
    args = TrainingArguments(
        output_dir=str(folder),
        **{
            **QUIET,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.02,
            "save_strategy": "steps",
            "save_steps": 3,
            **settings,
        },
    )
    callback = LanguageCyclerCallback(cycler, evaluate_with="finnish")
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:4], callbacks=[callback])
    return trainer, record


def test_the_trainer_has_another_language_for_every_micro_batch_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = model_with_languages(**CYCLE)
    trainer, record = trainer_of(whole, tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.train()
    expected = [language_of_batch(batch, LANGUAGES, seed=4) for batch in range(12)]
    assert record.train == expected
    assert set(record.evaluation) == {"finnish"} and len(record.evaluation) >= 3
    assert whole.active_adapters == [TASK, "finnish"]
    resumed = model_with_languages(**CYCLE)
    trainer, record = trainer_of(resumed, tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert record.train == expected[6:]
    for key, tensor in snapshot(whole).items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key
    trained = {name.split(".")[-2] for name, p in resumed.named_parameters() if p.requires_grad}
    assert trained == {TASK}


def test_the_start_of_training_activates_every_task_again() -> None:
    """A Trainer that resumes leaves the first adapter active, and the only one in training."""
    model = model_with_languages()
    model.add_adapter("style", spiel_config(seed=9))
    callback = LanguageCyclerCallback(LanguageCycler(model, LANGUAGES, [TASK, "style"], order="in_order"))
    model.set_adapter(TASK)
    callback.on_train_begin(None, None, None)
    assert model.active_adapters == [TASK, "style", "german"]
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {TASK, "style"}
