"""A tiny Llama under Hugging Face's Trainer and TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from support.models import tiny_llama
from support.text import rows, texts, tokenizer
from support.trainer_runs import arguments
from torch import nn
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from spiel_peft import SpIELConfig

from .helpers import CYCLE, STEPS


def config(**fields: Any) -> SpIELConfig:
    """A config for three kinds of layers; the trainer sets the length of the run."""
    cycle = {**CYCLE, "total_steps": None, "density": 0.1, **fields}
    return SpIELConfig(target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **cycle)


def adapted_llama(**fields: Any) -> PeftModel:
    return get_peft_model(tiny_llama(), config(**fields)).train()


def llama_trainer(
    folder: Path,
    model: nn.Module | None = None,
    callbacks: Any = None,
    growth: str | None = None,
    kind: type[Trainer] = Trainer,
    **settings: Any,
) -> Trainer:
    """A Trainer of `STEPS` steps, for `model` or for a new adapter with this growth criterion."""
    if model is None:
        model = adapted_llama(**({"growth": growth} if growth else {}))
    args = arguments(folder, **{"learning_rate": 0.02, "max_steps": STEPS, **settings})
    return kind(model=model, args=args, train_dataset=rows(64), eval_dataset=rows(64)[:8], callbacks=callbacks)


def sft_trainer(folder: Path, callbacks: Any = None, **settings: Any) -> Trainer:
    """An SFTTrainer of `STEPS` steps."""
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
    return SFTTrainer(
        model=tiny_llama(),
        args=args,
        train_dataset=texts(64),
        peft_config=config(),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )
