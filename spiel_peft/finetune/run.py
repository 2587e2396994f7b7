"""One fine-tuning run with TRL's SFTTrainer: reads a base model and a file of data, writes an adapter's folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState, set_seed

try:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("trl", "datasets"):
        raise
    raise ImportError("training needs TRL: pip install 'spiel-peft[train]'") from error

from ..callback import SpIELCallback
from ..files.folder import refuse_inputs
from .arguments import RunSettings, check_arguments, optimizer_of, training_arguments
from .base_model import ModelSource, find_model, load_base, load_tokenizer
from .data import Corpus, InputError, Row, prompt_ids, read_corpus, rows_that_fit, split_examples
from .run_folder import (
    ADAPTER,
    MERGED,
    STATE,
    Checkpoints,
    find_checkpoint,
    made_folder,
    remove_merged,
    save_adapter,
    save_merged,
    steps_of,
)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Answers:
    """Greedy answers to one question, without the adapter (`before`) and with it (`after`).

    An answer that was cut at its maximal length ends with "...".
    """

    question: str
    before: str
    after: str


@dataclass(frozen=True)
class RunResult:
    """The results of a run.

    Attributes:
        writes: whether this process is the one of several that has written the results; always so if it is alone.
        adapter: folder of the adapter.
        deltas: number of deltas.
        weights: number of parameters of the base model.
        steps: optimizer steps of the whole run, those before a resumption included.
        resumed_from: the checkpoint that the run was resumed from; None if it was not resumed.
        examples, held_out: numbers of training and evaluation examples.
        blank, duplicates: numbers of examples left out because they were blank or repeated another.
        train_loss: mean loss of the steps made now; None if the resumed run was complete already.
        eval_loss_before, eval_loss: loss on the evaluation data before the first and after the last step, in nats per
            learnt token, averaged over batches; None without evaluation data.
        closes: number of closes of the cycle in the log of the whole run.
        answers: answers to the questions of the settings, in their order; only of the process that writes.
        merged: folder of the merged checkpoint; None if it was not asked for.
    """

    writes: bool
    adapter: Path
    deltas: int
    weights: int
    steps: int
    resumed_from: Path | None
    examples: int
    held_out: int
    blank: int
    duplicates: int
    train_loss: float | None
    eval_loss_before: float | None
    eval_loss: float | None
    closes: int
    answers: list[Answers] = field(default_factory=list)
    merged: Path | None = None


@dataclass(frozen=True)
class _Inputs:
    """Everything that a run reads before it loads the model.

    Attributes:
        checkpoint: the checkpoint to resume from; None: begin.
        source: where the base model is.
        tokenizer: the model's tokenizer.
        arguments: for TRL's SFTTrainer.
        corpus: the training examples, and how many lines of the file were left out.
        rows, eval_rows: the training and evaluation data in TRL's form; without evaluation `eval_rows` is empty.
    """

    checkpoint: Path | None
    source: ModelSource
    tokenizer: Any
    arguments: SFTConfig
    corpus: Corpus
    rows: list[Row]
    eval_rows: list[Row]


def finetune(settings: RunSettings, progress: Progress | None = None) -> RunResult:
    """Train an adapter and save it in ``adapter`` of the output folder.

    In processes that ``accelerate launch`` or ``torchrun`` has started, all of them call it and train together; the
    first one writes.

    Input errors are found before anything is written. Only what the loaded model shows, such as target modules that it
    does not have, is found later; such an error leaves nothing that was not there before.

    Args:
        settings: model, data and every setting of the run.
        progress: called after every optimizer step with (steps done, steps of the whole run, the loss as text).

    Raises:
        InputError: an option or a file cannot be used; the message names it.
        FileExistsError: `output_dir` holds a run.
        ValueError, OSError, ImportError: errors of PEFT, TRL, transformers and bitsandbytes about model and settings.
    """
    inputs = _read_inputs(settings)
    set_seed(settings.seed)
    base = load_base(
        inputs.source, bf16=settings.bf16, load_in_4bit=settings.load_in_4bit, device=inputs.arguments.device
    )
    with made_folder(settings.output_dir):
        trainer = _make_trainer(settings, inputs, base, progress)
        _refuse_sharding(trainer)
        if settings.save_every:
            trainer.checkpoints.refuse_foreign(_planned_steps(trainer), settings.save_every)
        train_loss = _train(trainer, inputs.checkpoint)
        before, after = _eval_losses(trainer) if inputs.eval_rows else (None, None)
        model: Any = trainer.model
        trainable, total = model.get_nb_trainable_parameters()
        writes = trainer.is_world_process_zero()
        if writes:
            save_adapter(model, inputs.tokenizer, settings.output_dir)
            trainer.checkpoints.remove_replaced()
            trainer.save_state()
        answers = [_answers(model, inputs.tokenizer, question) for question in settings.questions] if writes else []
        if writes and settings.merge:
            save_merged(model, inputs.tokenizer, settings.output_dir)
        elif writes:
            remove_merged(settings.output_dir)
    return RunResult(
        writes=writes,
        adapter=settings.output_dir / ADAPTER,
        deltas=trainable,
        weights=total - trainable,
        steps=trainer.state.global_step,
        resumed_from=inputs.checkpoint,
        examples=len(inputs.rows),
        held_out=len(inputs.eval_rows),
        blank=inputs.corpus.blank,
        duplicates=inputs.corpus.duplicates,
        train_loss=train_loss,
        eval_loss_before=before,
        eval_loss=after,
        closes=sum("spiel/churn" in entry for entry in trainer.state.log_history),
        answers=answers,
        merged=settings.output_dir / MERGED if settings.merge else None,
    )


def _read_inputs(settings: RunSettings) -> _Inputs:
    """Find, read and check everything but the model's weights. Writes nothing."""
    if settings.output_dir.exists() and not settings.output_dir.is_dir():
        raise InputError(f"--output-dir {settings.output_dir}: it is a file")
    source = find_model(settings.model)
    _refuse_inputs(settings, source)
    more = check_arguments(settings)
    _refuse_4bit(settings, source)
    corpus, held_out = _read_data(settings)
    evaluated = bool(held_out.examples)
    arguments = training_arguments(settings, texts=corpus.kind == "texts", evaluated=evaluated, more=more)
    with arguments.main_process_first(local=False):  # it removes what killed runs left
        weights_only = bool(arguments.save_only_model)
        checkpoint = find_checkpoint(settings.output_dir, settings.resume, settings.overwrite, weights_only)
    tokenizer = load_tokenizer(source)
    rows = rows_that_fit(corpus.examples, tokenizer, settings.max_length, "training")
    eval_rows = rows_that_fit(held_out.examples, tokenizer, settings.max_length, "held-out") if evaluated else []
    return _Inputs(checkpoint, source, tokenizer, arguments, corpus, rows, eval_rows)


def _refuse_inputs(settings: RunSettings, source: ModelSource) -> None:
    """Raise a ValueError if the output folder is, holds or lies in something that the run reads."""
    model = Path(source.path) / source.gguf_file if source.gguf_file else source.path
    read = {
        "--model": model,
        "--data": settings.data,
        "--eval-data": settings.eval_data,
        "--config": settings.config_file,
    }
    refuse_inputs(settings.output_dir, read, "--output-dir")


def _make_trainer(settings: RunSettings, inputs: _Inputs, base: Any, progress: Progress | None) -> AdapterTrainer:
    """A trainer that logs the cycle and reports progress to a function instead of printing it."""
    checkpoints = Checkpoints(settings.output_dir, settings.resume, settings.overwrite)
    trainer = AdapterTrainer(
        model=base,
        args=inputs.arguments,
        train_dataset=Dataset.from_list(inputs.rows),
        eval_dataset=Dataset.from_list(inputs.eval_rows) if inputs.eval_rows else None,
        processing_class=inputs.tokenizer,
        peft_config=settings.config,
        optimizer_cls_and_kwargs=optimizer_of(settings),
        checkpoints=checkpoints,
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    trainer.add_callback(SpIELCallback())
    if progress is not None and trainer.is_world_process_zero():
        trainer.add_callback(_Report(progress))
    return trainer


class AdapterTrainer(SFTTrainer):
    """TRL's SFTTrainer that leaves alone what was in the output folder before.

    It writes no model card there, which could replace a README of the user's; the adapter's own folder gets the card
    that PEFT writes. It removes only checkpoints of its own run, as `checkpoints` says.
    """

    def __init__(self, *, checkpoints: Checkpoints, **options: Any) -> None:
        self.checkpoints = checkpoints
        super().__init__(**options)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # The Trainer would remove the oldest of all folders named checkpoint-*, whosever they are.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        writes = self.is_world_process_zero()
        try:
            with self.checkpoints.saving(self.state.global_step) if writes else nullcontext():
                # All processes write a file of their own into the folder that the first one makes and finishes.
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
        finally:
            self.args.save_total_limit = limit
        if writes:
            self.checkpoints.keep(limit, self.state.best_model_checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card."""


def _refuse_sharding(trainer: SFTTrainer) -> None:
    """Raise InputError if the base model is to be spread over several processes."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise InputError(
            "spiel-peft train keeps the whole base model on every GPU; launch it with distributed_type: MULTI_GPU, or "
            "shard the model with a script such as examples/accelerate/train.py"
        )


def _refuse_4bit(settings: RunSettings, source: ModelSource) -> None:
    """Raise InputError if `--load-in-4bit` was given for a GGUF file or together with `--merge`."""
    if settings.load_in_4bit and source.gguf_file:
        raise InputError(f"--load-in-4bit cannot quantize a GGUF file ({source}); give an unquantized --model")
    if settings.load_in_4bit and settings.merge:
        raise InputError(
            "--merge with --load-in-4bit would round most deltas away; leave --merge out, and merge the adapter into "
            "the unquantized base with spiel-peft merge"
        )


def _read_data(settings: RunSettings) -> tuple[Corpus, Corpus]:
    """The training data and the evaluation data; the latter have no examples if nothing is to be held out."""
    corpus = read_corpus(settings.data)
    if settings.eval_data is not None:
        held_out = read_corpus(settings.eval_data)
        if held_out.kind != corpus.kind:
            raise InputError(
                f"--eval-data {settings.eval_data} holds {held_out.kind}, but --data {settings.data} holds "
                f"{corpus.kind}; give a file of {corpus.kind}"
            )
        return corpus, held_out
    if not settings.held_out:
        return corpus, replace(corpus, examples=[])
    train, held_out_examples = split_examples(corpus.examples, settings.held_out)
    return replace(corpus, examples=train), replace(corpus, examples=held_out_examples)


def _train(trainer: SFTTrainer, checkpoint: Path | None) -> float | None:
    """Train and return the mean loss.

    If the checkpoint is of the last step, its adapter and log are loaded instead, and None is returned.
    """
    if checkpoint is not None and steps_of(checkpoint) >= _planned_steps(trainer):
        # Resumed from its last step, the Trainer would train one step too many.
        model: Any = trainer.model
        model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)
        trainer.state = TrainerState.load_from_json(str(checkpoint / STATE))
        return None
    return float(trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).training_loss)


def _planned_steps(trainer: SFTTrainer) -> int:
    """Optimizer steps of the whole run, counted as the Trainer counts them."""
    arguments = trainer.args
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    steps = max(1, math.ceil(len(trainer.get_train_dataloader()) / arguments.gradient_accumulation_steps))
    return math.ceil(arguments.num_train_epochs * steps)


def _eval_losses(trainer: SFTTrainer) -> tuple[float | None, float]:
    """The evaluation loss before the first step (None if it was not logged) and after the last step.

    The latter is measured now if the log does not have it.
    """
    losses = {entry["step"]: float(entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry}
    last = trainer.state.global_step
    return losses.get(0), losses[last] if last in losses else float(trainer.evaluate()["eval_loss"])


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, question: str, max_new_tokens: int = 48) -> Answers:
    """Generate greedy answers to a question, with the adapter and with the base model alone."""
    model.eval()
    ids = torch.tensor([prompt_ids([{"role": "user", "content": question}], tokenizer)], device=model.device)

    def answer() -> str:
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        said = output[0, ids.shape[1] :]
        text = str(tokenizer.decode(said, skip_special_tokens=True)).strip()
        return f"{text} ..." if len(said) == max_new_tokens else text

    after = answer()
    with model.disable_adapter():
        return Answers(question, answer(), after)


class _Report(TrainerCallback):
    """Calls a function with the Trainer's progress after every step and at every logged loss."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.loss = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {float(logs['loss']):.3f}"
            self.progress(state.global_step, state.max_steps, self.loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress(state.global_step, state.max_steps, self.loss)
