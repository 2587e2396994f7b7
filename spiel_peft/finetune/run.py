"""One fine-tuning run by TRL's SFTTrainer: from a base model and a file of data to an adapter's folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState, set_seed

try:
    from datasets import Dataset
    from trl import SFTTrainer
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("trl", "datasets"):
        raise
    raise ImportError("training needs TRL: pip install 'spiel-peft[train]'") from error

from ..callback import SpIELCallback
from ..files.folder import whole_folder
from .arguments import RunSettings, read_arguments, training_arguments
from .base_model import find_model, load_base, load_tokenizer
from .data import Corpus, InputError, prompt_ids, read_corpus, rows_that_fit, split_examples
from .run_folder import (
    ADAPTER,
    MERGED,
    STATE,
    checkpoints_in,
    find_checkpoint,
    remove_merged,
    remove_unfinished,
    steps_of,
)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Answers:
    """The most likely answers to a question, without and with the adapter; "..." ends one that was cut."""

    question: str
    before: str
    after: str


@dataclass(frozen=True)
class RunResult:
    """What a run has done.

    Attributes:
        adapter: its folder.
        deltas: number of trained values.
        weights: parameters of the base model.
        steps: optimizer steps, those before a resumption included.
        resumed_from: the checkpoint that it went on from, if any.
        examples, held_out: how many answers or texts were trained and evaluated on.
        blank, duplicates: how many of the data were left out.
        train_loss: mean of the steps made now; None if the run was complete already.
        eval_loss_before, eval_loss: on the evaluation data, nats per learnt token averaged over batches; None without.
        closes: closes of the cycle logged over the whole run.
        answers: to the questions of the settings.
        merged: folder of the merged checkpoint, if it was asked for.
    """

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


def finetune(settings: RunSettings, progress: Progress | None = None) -> RunResult:
    """Train an adapter and save it.

    Everything that can be wrong with the input is found before anything is written, except what only the loaded model
    tells, such as target modules that it does not have; that leaves an empty output folder at most.

    Args:
        settings: see there.
        progress: called after every step with (steps done, steps of the run, the loss).

    Raises:
        InputError: names the option or file. FileExistsError: `output_dir` holds a run.
        ValueError, OSError, ImportError: what PEFT, TRL, transformers and bitsandbytes say of model and settings.
    """
    checkpoint = find_checkpoint(settings.output_dir, settings.resume, settings.overwrite)
    source = find_model(settings.model)
    _refuse_4bit(settings, source)
    more = read_arguments(settings.arguments) if settings.arguments is not None else {}
    corpus, held_out = _read(settings)
    evaluated = bool(held_out.examples)
    arguments = training_arguments(settings, texts=corpus.kind == "texts", evaluated=evaluated, more=more)
    tokenizer = load_tokenizer(source)
    rows = rows_that_fit(corpus.examples, tokenizer, settings.max_length, "training")
    eval_rows = rows_that_fit(held_out.examples, tokenizer, settings.max_length, "held-out") if evaluated else []
    set_seed(settings.seed)
    base = load_base(source, bf16=settings.bf16, load_in_4bit=settings.load_in_4bit)
    try:
        trainer = AdapterTrainer(
            model=base,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(eval_rows) if evaluated else None,
            processing_class=tokenizer,
            peft_config=settings.config,
        )
        _watch(trainer, progress)
        for old in checkpoints_in(settings.output_dir) if settings.overwrite else ():
            shutil.rmtree(old)  # else a resumption could go on from the earlier run
        train_loss = _train(trainer, checkpoint)
        before, after = _eval_losses(trainer) if evaluated else (None, None)
        model: Any = trainer.model
        trainable, total = model.get_nb_trainable_parameters()
        _save_adapter(trainer, settings.output_dir)
        answers = [_answers(model, tokenizer, question) for question in settings.questions]
        if settings.merge:
            merged = _save_merged(trainer, settings.output_dir)
        else:
            merged = None
            remove_merged(settings.output_dir)  # of an earlier adapter
    except BaseException:
        remove_unfinished(settings.output_dir)
        raise
    return RunResult(
        adapter=settings.output_dir / ADAPTER,
        deltas=trainable,
        weights=total - trainable,
        steps=trainer.state.global_step,
        resumed_from=checkpoint,
        examples=len(rows),
        held_out=len(eval_rows),
        blank=corpus.blank,
        duplicates=corpus.duplicates,
        train_loss=train_loss,
        eval_loss_before=before,
        eval_loss=after,
        closes=sum("spiel/churn" in entry for entry in trainer.state.log_history),
        answers=answers,
        merged=merged,
    )


class AdapterTrainer(SFTTrainer):
    """TRL's SFTTrainer without its model card: a card in the output folder could replace a README that is there.

    The adapter's folder gets the card that PEFT writes.
    """

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing."""


def _watch(trainer: SFTTrainer, progress: Progress | None) -> None:
    """Log the cycle and report progress, instead of printing."""
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    trainer.add_callback(SpIELCallback())
    if progress is not None:
        trainer.add_callback(_Report(progress))


def _refuse_4bit(settings: RunSettings, source: Any) -> None:
    if settings.load_in_4bit and source.gguf_file:
        raise InputError(f"--load-in-4bit cannot quantize a GGUF file ({source}); give an unquantized --model")
    if settings.load_in_4bit and settings.merge:
        raise InputError(
            "--merge with --load-in-4bit would round most deltas away; leave --merge out, and merge the adapter into "
            "the unquantized base with spiel-peft merge"
        )


def _read(settings: RunSettings) -> tuple[Corpus, Corpus]:
    """What to train on and what to evaluate on; the latter may be empty."""
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
    """Train, and return the mean loss; of a run that is complete only load the result and its log."""
    if checkpoint is not None and steps_of(checkpoint) >= _planned_steps(trainer):
        # Told to go on from there, the Trainer would make one step more.
        model: Any = trainer.model
        model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)
        trainer.state = TrainerState.load_from_json(str(checkpoint / STATE))
        return None
    return float(trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).training_loss)


def _planned_steps(trainer: SFTTrainer) -> int:
    """Optimizer steps of the whole run, as the Trainer counts them."""
    arguments = trainer.args
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    steps = max(1, math.ceil(len(trainer.get_train_dataloader()) / arguments.gradient_accumulation_steps))
    return math.ceil(arguments.num_train_epochs * steps)


def _eval_losses(trainer: SFTTrainer) -> tuple[float | None, float]:
    """The loss before the first step, if it was logged, and after the last one, which is measured if it was not."""
    losses = {entry["step"]: float(entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry}
    last = trainer.state.global_step
    return losses.get(0), losses[last] if last in losses else float(trainer.evaluate()["eval_loss"])


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, question: str, max_new_tokens: int = 48) -> Answers:
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


def _save_adapter(trainer: SFTTrainer, folder: Path) -> None:
    """Save the adapter with its tokenizer, and the log."""
    model: Any = trainer.model
    with whole_folder(folder / ADAPTER, overwrite=True) as work:
        # The vocabulary is never resized here, so PEFT need not look into the base model for that.
        model.save_pretrained(str(work), save_embedding_layers=False)
        trainer.processing_class.save_pretrained(str(work))
    trainer.save_state()


def _save_merged(trainer: SFTTrainer, folder: Path) -> Path:
    """Save the base model with the deltas added, which ends the adapter in memory; the folder."""
    model: Any = trainer.model
    with whole_folder(folder / MERGED, overwrite=True) as work:
        model.merge_and_unload().save_pretrained(str(work))
        trainer.processing_class.save_pretrained(str(work))
    return folder / MERGED


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
