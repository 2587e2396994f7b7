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
from trl import SFTConfig

from ..config import SpIELConfig
from ..optimizers import SM3
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
        warmup_steps: steps in which the learning rate rises; below 1: a share of the run.
        max_steps: length of the run; None: `epochs` passes over the data.
        save_every: steps between checkpoints; 0: no checkpoints.
        eval_every: steps between evaluations; 0: only before and after the run.
        resume: resume the run in `output_dir` from its last checkpoint.
        overwrite: replace the run in `output_dir`.
        arguments: further fields of TRL's `SFTConfig`; as `optim` also "sm3", the SM3 of this package.
        config_file: the file that `arguments` were read from, if any.
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
    warmup_steps: float = 10
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
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config_file: Path | None = None
    questions: Sequence[str] = ()
    merge: bool = False

    @property
    def source(self) -> str:
        """How errors call the place that `arguments` are from."""
        return "arguments" if self.config_file is None else f"--config {self.config_file}"


# The `optim` that is no name of transformers': the optimizer SM3 of this package.
SM3_NAME = "sm3"

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


def check_arguments(settings: RunSettings) -> dict[str, Any]:
    """Check the names of the further fields of `SFTConfig`, and make numbers of strings.

    Raises:
        InputError: a field is unknown, of the wrong type, or set by an option.
    """
    fields = {field.name: field for field in dataclasses.fields(SFTConfig) if field.init}
    for name in settings.arguments:
        if name in TAKEN:
            raise InputError(f"{settings.source}: {name} is set by {TAKEN[name]}; remove it from the file")
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"{settings.source}: SFTConfig of TRL has no field {name!r}{hint}")
    return {name: _number(value, fields[name], settings.source) for name, value in settings.arguments.items()}


def _number(value: Any, field: dataclasses.Field[Any], source: str) -> Any:
    """Convert a string to a float if the field is one: YAML reads 1e-4, without a point, as a string."""
    if not isinstance(field.default, float) or not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise InputError(f"{source}: {field.name} must be a number, got {value!r}") from None


def optimizer_of(settings: RunSettings) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """The class and settings of the optimizer if `optim` is "sm3"; None if transformers is to make it."""
    if settings.arguments.get("optim") != SM3_NAME:
        return None
    return SM3, {"lr": settings.learning_rate}


def training_arguments(settings: RunSettings, *, texts: bool, evaluated: bool, more: Mapping[str, Any]) -> SFTConfig:
    """The arguments of TRL's SFTTrainer for a run.

    bf16, gradient checkpointing, learning rate and length are always set, because TRL's defaults differ from those of
    transformers.

    Args:
        settings: the settings of the run.
        texts: whether the data are plain texts.
        evaluated: whether there are evaluation data.
        more: fields from `check_arguments`; they replace the defaults made here.

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
    if arguments.get("optim") == SM3_NAME:
        del arguments["optim"]  # transformers does not know it; see `optimizer_of`
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
        raise InputError(f"{settings.source}: {' '.join(str(error).split())}") from error
