"""A tiny Llama under Hugging Face's Trainer and TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapters.helpers import tiny_llama
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from trainer_helpers import arguments
from transformers import PreTrainedTokenizerFast, Trainer
from trl import SFTConfig, SFTTrainer

from spiel_peft import SpIELConfig

from .helpers import CYCLE, STEPS


def config(**fields: Any) -> SpIELConfig:
    """Targets three kinds of layers; the length of the run is the trainer's to tell."""
    cycle = {**CYCLE, "total_steps": None, "density": 0.1, **fields}
    return SpIELConfig(target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **cycle)


def adapted_llama(**fields: Any) -> PeftModel:
    return get_peft_model(tiny_llama(), config(**fields)).train()


def sentences(count: int = 64) -> list[list[int]]:
    """Counting in steps of one to three."""
    return [[3 + (start + step * n) % 37 for n in range(8)] for start in range(count // 2) for step in (1, 2)]


def llama_trainer(
    folder: Path,
    model: nn.Module | None = None,
    callbacks: Any = None,
    growth: str | None = None,
    kind: type[Trainer] = Trainer,
    **settings: Any,
) -> Trainer:
    """A trainer of `STEPS` steps; of a new adapter with this growth criterion, unless a model is given."""
    if model is None:
        model = adapted_llama(**({"growth": growth} if growth else {}))
    rows = [{"input_ids": ids, "labels": ids} for ids in sentences()]
    args = arguments(folder, **{"learning_rate": 0.02, "max_steps": STEPS, **settings})
    return kind(model=model, args=args, train_dataset=rows, eval_dataset=rows[:8], callbacks=callbacks)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{n}" for n in range(37))])}
    by_word = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=by_word, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def sft_trainer(folder: Path, callbacks: Any = None, **settings: Any) -> Trainer:
    """TRL's trainer with the config in place of LoRA's."""
    args = SFTConfig(
        output_dir=str(folder),
        max_length=16,
        bf16=False,
        **{
            key: value
            for key, value in arguments(folder, learning_rate=0.02, max_steps=STEPS, **settings).to_dict().items()
            if key in ("max_steps", "per_device_train_batch_size", "learning_rate", "use_cpu", "save_strategy")
            or key in ("report_to", "logging_steps", "disable_tqdm", "dataloader_pin_memory", "save_steps")
        },
    )
    texts = Dataset.from_list([{"text": " ".join(f"w{i - 3}" for i in ids)} for ids in sentences()])
    return SFTTrainer(
        model=tiny_llama(),
        args=args,
        train_dataset=texts,
        peft_config=config(),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )
