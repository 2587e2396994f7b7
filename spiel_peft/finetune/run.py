"""One fine-tuning run by Hugging Face's Trainer: from a base model and a file of data to an adapter's folder."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ..callback import SpIELCallback
from ..config import SpIELConfig
from ..files.atomic import whole_folder
from .base_model import find_model, load_base, load_tokenizer
from .data import AnswerCollator, InputError, Tokens, encode_all, read_examples, split_examples
from .run_folder import ADAPTER, STATE, checkpoints_in, find_checkpoint, remove_unfinished, steps_of

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class RunSettings:
    """What is trained on what, and how; every length in optimizer steps.

    Attributes:
        model: folder of a checkpoint, a ``.gguf`` file, or a hub id.
        data: ``.jsonl`` of pairs, chats or texts, or ``.txt`` of paragraphs.
        output_dir: the adapter goes to ``adapter`` in it, the Trainer's checkpoints beside that.
        config: the SpIEL settings.
        eval_data: file to evaluate on; None: `held_out` of `data`.
        held_out: share of the questions or texts that is held out, 0 for none.
        max_length: tokens of an example; longer answers are cut, longer texts become several.
        max_steps: length of the run; None: `epochs` passes over the data.
        save_every, eval_every: steps between checkpoints and evaluations; 0: only at the end.
        resume: go on from the last checkpoint in `output_dir`.
        overwrite: begin anew although `output_dir` holds a run.
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


@dataclass(frozen=True)
class RunResult:
    """What a run has done.

    Attributes:
        adapter: its folder.
        deltas: number of trained values.
        weights: parameters of the base model.
        steps: optimizer steps, those before a resumption included.
        resumed_from: the checkpoint that it went on from, if any.
        examples, held_out: how many were trained and evaluated on.
        train_loss: mean of the steps made now; None if the run was complete already.
        eval_loss_before, eval_loss: on the evaluation data, nats per learnt token averaged over batches; None without.
        closes: closes of the cycle logged over the whole run.
    """

    adapter: Path
    deltas: int
    weights: int
    steps: int
    resumed_from: Path | None
    examples: int
    held_out: int
    train_loss: float | None
    eval_loss_before: float | None
    eval_loss: float | None
    closes: int = field(default=0)


def finetune(settings: RunSettings, progress: Progress | None = None) -> RunResult:
    """Train an adapter and save it.

    Everything that can be wrong with the input is found before anything is written, except what only the loaded model
    tells, such as target modules that it does not have; that leaves an empty output folder at most.

    Args:
        settings: see there.
        progress: called after every step with (steps done, steps of the run, the loss).

    Raises:
        InputError: names the option or file. FileExistsError: `output_dir` holds a run.
        ValueError, OSError, ImportError: what PEFT, transformers and bitsandbytes say of model and settings.
    """
    checkpoint = find_checkpoint(settings.output_dir, settings.resume, settings.overwrite)
    source = find_model(settings.model)
    if source.gguf_file and settings.load_in_4bit:
        raise InputError(f"--load-in-4bit cannot quantize a GGUF file ({source}); give an unquantized --model")
    train, held_out = _examples(settings)
    tokenizer = load_tokenizer(source)
    train_tokens = encode_all(train, tokenizer, settings.max_length, "training")
    eval_tokens = encode_all(held_out, tokenizer, settings.max_length, "held-out") if held_out else []
    set_seed(settings.seed)
    base = load_base(source, bf16=settings.bf16, load_in_4bit=settings.load_in_4bit)
    complete = checkpoint is not None and steps_of(checkpoint) >= _planned_steps(settings, len(train_tokens))
    if complete:
        model = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)
    else:
        model = get_peft_model(base, settings.config)
    trainer = _trainer(model, settings, train_tokens, eval_tokens, AnswerCollator(tokenizer.pad_token_id), progress)
    try:
        before = _eval_loss(trainer) if eval_tokens and checkpoint is None else None
        for old in checkpoints_in(settings.output_dir) if settings.overwrite else ():
            shutil.rmtree(old)  # else a resumption could go on from the earlier run
        train_loss = _train(trainer, checkpoint, complete)
        after = _last_eval_loss(trainer) if eval_tokens else None
        _save(trainer, model, tokenizer, settings.output_dir)
    except BaseException:
        remove_unfinished(settings.output_dir)
        raise
    trainable, total = model.get_nb_trainable_parameters()
    return RunResult(
        adapter=settings.output_dir / ADAPTER,
        deltas=trainable,
        weights=total - trainable,
        steps=trainer.state.global_step,
        resumed_from=checkpoint,
        examples=len(train_tokens),
        held_out=len(eval_tokens),
        train_loss=train_loss,
        eval_loss_before=before,
        eval_loss=after,
        closes=sum("spiel/churn" in entry for entry in trainer.state.log_history),
    )


def _train(trainer: Trainer, checkpoint: Path | None, complete: bool) -> float | None:
    """Train, and return the mean loss; of a run that is complete only take its log."""
    if complete:
        # Told to go on from there, the Trainer would make one step more.
        trainer.state = TrainerState.load_from_json(str(checkpoint / STATE))
        return None
    return float(trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).training_loss)


def _save(trainer: Trainer, model: Any, tokenizer: Any, folder: Path) -> None:
    with whole_folder(folder / ADAPTER, overwrite=True) as work:
        # The vocabulary is never resized here, so PEFT need not look into the base model for that.
        model.save_pretrained(str(work), save_embedding_layers=False)
        tokenizer.save_pretrained(str(work))
    trainer.save_state()


def _planned_steps(settings: RunSettings, examples: int) -> int:
    """Optimizer steps of the whole run, as the Trainer counts them in a single process."""
    batches = math.ceil(examples / settings.batch_size)
    return settings.max_steps or math.ceil(settings.epochs * max(1, math.ceil(batches / settings.grad_accum)))


def _examples(settings: RunSettings) -> tuple[list[Any], list[Any]]:
    """Examples to train on and to evaluate on."""
    train = read_examples(settings.data).examples
    if settings.eval_data is not None:
        return train, read_examples(settings.eval_data).examples
    return split_examples(train, settings.held_out) if settings.held_out else (train, [])


def _trainer(
    model: Any,
    settings: RunSettings,
    train: list[Tokens],
    held_out: list[Tokens],
    collator: AnswerCollator,
    progress: Progress | None,
) -> Trainer:
    on_gpu = torch.cuda.is_available()
    checkpointing: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        # Reentrant checkpoints need an input with a gradient, which a frozen embedding does not give.
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=os.fspath(settings.output_dir),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_steps,
        weight_decay=0.0,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=2 * settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        max_steps=settings.max_steps or -1,
        num_train_epochs=settings.epochs,
        bf16=settings.bf16,
        use_cpu=not on_gpu,  # without which the Trainer refuses bf16 on a CPU
        seed=settings.seed,
        logging_steps=1,
        disable_tqdm=True,
        eval_strategy="steps" if settings.eval_every and held_out else "no",
        eval_steps=settings.eval_every or None,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 500,
        save_total_limit=2,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        prediction_loss_only=True,
        **checkpointing,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,  # type: ignore[arg-type]
        eval_dataset=held_out or None,  # type: ignore[arg-type]
        data_collator=collator,
        callbacks=[SpIELCallback(), *([_Report(progress)] if progress is not None else [])],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _eval_loss(trainer: Trainer) -> float:
    return float(trainer.evaluate()["eval_loss"])


def _last_eval_loss(trainer: Trainer) -> float:
    """The loss after the last step, which the Trainer may have measured already."""
    for entry in reversed(trainer.state.log_history):
        if entry["step"] == trainer.state.global_step and "eval_loss" in entry:
            return float(entry["eval_loss"])
    return _eval_loss(trainer)


class _Report(TrainerCallback):
    """Passes the Trainer's progress on."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.loss = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {float(logs['loss']):.3f}"
            self.progress(state.global_step, state.max_steps, self.loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress(state.global_step, state.max_steps, self.loss)
