"""The settings of a run, and the arguments of TRL's SFTTrainer made from them and from the file of `--config`."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from trl import SFTConfig

from ..config import SpIELConfig
from .data import InputError


@dataclass(frozen=True)
class RunSettings:
    """Model, data and training settings of one run. All lengths are in optimizer steps.

    Attributes:
        model: folder of a checkpoint, a ``.gguf`` file, or a hub id.
        data: ``.jsonl`` file of pairs, chats or texts, or ``.txt`` file of paragraphs.
        output_dir: folder for the adapter (in ``adapter``) and the Trainer's checkpoints.
        config: the SpIEL settings.
        eval_data: file to evaluate on; None: the held-out share of `data`.
        held_out: share of the questions or texts that is held out for evaluation; 0: none.
        max_length: tokens of an example; longer answers are cut, longer texts become several examples.
        max_steps: length of the run; None: `epochs` passes over the data.
        save_every: steps between checkpoints; 0: no checkpoints.
        eval_every: steps between evaluations; 0: only before and after the run.
        resume: resume the run in `output_dir` from its last checkpoint.
        overwrite: replace the run in `output_dir`.
        arguments: YAML file with further fields of TRL's `SFTConfig`.
        questions: questions that the model answers after the run, with and without the adapter.
        merge: save the merged model too, in ``merged`` of `output_dir`.
    """

    model: str
    data: Path
    output_dir: Path
    config: SpIELConfig
    eval_data: Path | None = None
    held_out: float = 0.1
    max_length: int = 512
    max_steps: int | None = None
    epochs: float = 1.0
    learning_rate: float = 5e-4
    warmup_steps: int = 10
    batch_size: int = 4
    grad_accum: int = 1
    save_every: int = 100
    eval_every: int = 0
    seed: int = 0
    bf16: bool = False
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False
    resume: bool = False
    overwrite: bool = False
    arguments: Path | None = None
    questions: Sequence[str] = ()
    merge: bool = False


# Fields of SFTConfig that a --config file must not set, and what sets them instead.
TAKEN = {
    "output_dir": "--output-dir",
    "learning_rate": "--learning-rate",
    "warmup_steps": "--warmup-steps",
    "per_device_train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--grad-accum",
    "max_steps": "--max-steps",
    "num_train_epochs": "--epochs",
    "max_length": "--max-length",
    "bf16": "--bf16",
    "gradient_checkpointing": "--gradient-checkpointing",
    "seed": "--seed",
    "eval_on_start": "--held-out",
    "prediction_loss_only": "the command itself",
    "use_cpu": "the command itself",
    "eval_strategy": "--eval-every",
    "eval_steps": "--eval-every",
    "save_strategy": "--save-every",
    "save_steps": "--save-every",
    "packing": "the kind of --data (texts are packed)",
    "model_init_kwargs": "--model, --bf16 and --load-in-4bit",
}


def read_arguments(path: Path) -> dict[str, Any]:
    """Read fields of `SFTConfig` from a YAML file.

    Raises:
        InputError: the file cannot be read, or a field is unknown, of the wrong type, or set by an option.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise InputError(f"--config {path}: expected lines of 'field: value', got {type(found).__name__}")
    fields = {field.name: field for field in dataclasses.fields(SFTConfig) if field.init}
    for name in found:
        if name in TAKEN:
            raise InputError(f"--config {path}: {name} is set by {TAKEN[name]}; remove it from the file")
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"--config {path}: SFTConfig of TRL has no field {name!r}{hint}")
    return {name: _number(value, fields[name], path) for name, value in found.items()}


def _number(value: Any, field: dataclasses.Field[Any], path: Path) -> Any:
    """Convert a string to a float if the field is one: YAML reads 1e-4, without a point, as a string."""
    if not isinstance(field.default, float) or not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise InputError(f"--config {path}: {field.name} must be a number, got {value!r}") from None


def training_arguments(settings: RunSettings, *, texts: bool, evaluated: bool, more: Mapping[str, Any]) -> SFTConfig:
    """The arguments of TRL's SFTTrainer for a run.

    bf16, gradient checkpointing, learning rate and length are always set, because TRL's defaults differ from those of
    transformers.

    Args:
        settings: the settings of the run.
        texts: whether the data are plain texts.
        evaluated: whether there are evaluation data.
        more: fields from `read_arguments`; they replace the defaults made here.

    Raises:
        InputError: SFTConfig refuses the fields in `more`.
    """
    on_gpu = torch.cuda.is_available()
    arguments: dict[str, Any] = {
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "per_device_eval_batch_size": 2 * settings.batch_size,
        # Reentrant checkpoints need an input that requires a gradient; the output of a frozen embedding does not.
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if settings.gradient_checkpointing else None,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_total_limit": 2,
        "report_to": "none",
        "dataloader_pin_memory": on_gpu,
        "packing_strategy": "wrapped",
    }
    arguments.update(more)
    try:
        return SFTConfig(
            output_dir=os.fspath(settings.output_dir),
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.grad_accum,
            max_steps=settings.max_steps or -1,
            num_train_epochs=settings.epochs,
            max_length=settings.max_length,
            bf16=settings.bf16,
            gradient_checkpointing=settings.gradient_checkpointing,
            use_cpu=not on_gpu,  # the Trainer refuses bf16 on a CPU otherwise
            seed=settings.seed,
            # The log begins with the loss before the first step; the log of a resumed run has it already.
            eval_on_start=evaluated and not settings.resume,
            eval_strategy="steps" if settings.eval_every and evaluated else "no",
            eval_steps=settings.eval_every or None,
            save_strategy="steps" if settings.save_every else "no",
            save_steps=settings.save_every or 500,
            packing=texts,
            prediction_loss_only=True,
            **arguments,
        )
    except (TypeError, ValueError) as error:
        if not more:
            raise
        raise InputError(f"--config {settings.arguments}: {' '.join(str(error).split())}") from error
