"""transformers' Trainer and Seq2SeqTrainer, with nothing but the config swapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from support.adapters import log_of
from support.models import tiny_t5
from support.text import rows, sentences
from support.trainer_runs import QUIET
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)

from .helpers import Watch, adapted, arguments, assert_reloads, config


def trainer(model: nn.Module, folder: Path, callbacks: Any = None, **settings: Any) -> Trainer:
    return Trainer(model=model, args=arguments(folder, **settings), train_dataset=rows(), callbacks=callbacks)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}])
def test_trainer_without_callback(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The length of the run is found without the callback: rates follow the linear schedule over max_steps."""
    model = adapted()
    watch = Watch(model)
    trainer(model, tmp_path, **settings).train()
    watch.check([2, 6, 10], 12)
    model.save_pretrained(tmp_path / "adapter")
    assert_reloads(model, tmp_path / "adapter")


def test_epochs_tell_the_length_too(tmp_path: Path) -> None:
    model = adapted()
    trainer(model, tmp_path, max_steps=-1, num_train_epochs=3).train()
    assert [report.rate for report in log_of(model)] == pytest.approx([1.0, 0.2 * (1 - 6 / 12), 0.2 * (1 - 10 / 12)])


def tiny_bart() -> nn.Module:
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"vocab_size": 40, "d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "dropout": 0.0}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 2}
    settings = BartConfig(**sizes, **layers, **tokens, max_position_embeddings=32, init_std=0.2)
    return BartForConditionalGeneration(settings).eval()


def translations() -> Dataset:
    """Pairs of a sentence and four times the same word."""
    return Dataset.from_list([{"input_ids": ids, "labels": [5] * 4} for ids in sentences()])


def translated(model: nn.Module) -> Any:
    data = translations()
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(list(data["input_ids"])), labels=torch.tensor(list(data["labels"])))


def translation_loss(model: nn.Module) -> float:
    return translated(model).loss.item()


def translation_logits(model: nn.Module) -> Tensor:
    return translated(model).logits


SEQ2SEQ = {
    "T5": (tiny_t5, ["q", "v", "wi", "wo"]),
    "BART": (tiny_bart, ["q_proj", "v_proj", "fc1", "fc2"]),
}


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_seq2seq_trainer(name: str, tmp_path: Path) -> None:
    """Seq2SeqTrainer generates in its evaluation, in the middle of the run."""
    base, targets = SEQ2SEQ[name]
    model = get_peft_model(base(), config(task_type="SEQ_2_SEQ_LM", target_modules=targets))
    watch = Watch(model, translation_loss)
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=0.02,
        predict_with_generate=True,
        eval_strategy="steps",
        eval_steps=5,
        **QUIET,
    )
    generated = []

    def note(predictions: Any) -> dict[str, float]:
        generated.append(len(predictions.predictions))
        return {}

    data = translations()
    training = Seq2SeqTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data.select(range(4)), compute_metrics=note
    )
    training.train()
    assert generated[:2] == [4, 4]  # newer versions of transformers evaluate at the end, too
    watch.check([2, 6, 10], 12)
    training.save_model(str(tmp_path / "adapter"))
    assert_reloads(model, tmp_path / "adapter", base, translation_logits)
