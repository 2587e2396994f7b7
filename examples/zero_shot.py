#!/usr/bin/env python
"""Zero-shot transfer by adding sparse deltas: a task learnt in one language, answered in others.

One adapter per language learns from plain text, one adapter learns the task (answering questions) from the pairs of
the source language alone. Then the deltas of a target language and of the task are active together (Ansell et al.,
2022), although no question was ever asked in that language in training. Without arguments: SmolLM2-135M-Instruct and
the dialogues of chatterbot-corpus, on a CPU.

    python examples/zero_shot.py --task-training separate   # the task on the bare model
    python examples/zero_shot.py --task-training on-top     # on the source language's frozen deltas
    python examples/zero_shot.py --task-training ready      # the target languages take turns (Parović et al., 2023)

The composition is in `train_task` and `measure`; the rest is what any PEFT training script does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from _args import _Parser, positive_float, positive_int
from _data import (
    AnswerCollator,
    Example,
    Tokens,
    encode_all,
    read_chatterbot,
    read_jsonl,
    split_examples,
)
from _model import find_model, held_out_loss, load_base, load_tokenizer
from _report import field, heading
from _script import run_script
from spiel_peft import (
    KeepActive,
    LanguageCycler,
    LanguageCyclerCallback,
    SpIELCallback,
    SpIELConfig,
    activate,
    overlap,
)

TASK = "task"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a wrong one."""
    parser = _Parser(
        prog="zero_shot.py",
        description="Zero-shot transfer with language and task adapters.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", metavar="ID_OR_DIR", help="folder, .gguf file or hub id; None: SmolLM2-135M-Instruct")
    add("--data-dir", type=Path, metavar="DIR", help="a LANGUAGE.jsonl of pairs each; None: chatterbot-corpus")
    add("--source", default="english", help="language in which the task is learnt")
    add("--languages", nargs="+", default=["italian", "spanish"], help="languages to transfer to")
    add("--task-training", choices=["separate", "on-top", "ready"], default="ready", help="what is under the task")
    add("--r", type=positive_int, default=16, help="as many deltas as LoRA of this rank has")
    add("--language-steps", type=positive_int, default=30, help="optimizer steps per language")
    add("--task-steps", type=positive_int, default=30, help="optimizer steps of the task")
    add("--learning-rate", type=positive_float, default=5e-4, help="peak learning rate")
    add("--batch-size", type=positive_int, default=4, help="examples per batch")
    add("--max-length", type=positive_int, default=96, help="tokens of an example; longer ones are cut")
    add("--max-held-out", type=positive_int, default=60, help="held-out pairs per language, at most")
    add("--output-dir", type=Path, default=Path("outputs/zero_shot"), help="folder for the adapters and results")
    add("--seed", type=int, default=0, help="seed of everything random")
    args = parser.parse_args(argv)
    if len({args.source, *args.languages}) <= len(args.languages):
        parser.error("--languages must be distinct, and other than --source")
    return args


# -- data ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Language:
    """One language's plain text to learn the language from, its pairs to learn the task from, and held-out pairs."""

    text: list[Tokens]
    pairs: list[Tokens]
    held_out: list[Tokens]


def read_language(name: str, tokenizer: Any, args: argparse.Namespace) -> Language:
    """The pairs of a language, split by question. Raises InputError."""
    pairs = read_chatterbot(name) if args.data_dir is None else read_jsonl(args.data_dir / f"{name}.jsonl")
    pairs = list(dict.fromkeys(pair for pair in pairs if pair.question and pair.answer))
    train, held_out = split_examples(pairs, 0.2)
    return Language(
        text=[as_text(pair, tokenizer, args.max_length) for pair in train],
        pairs=encode_all(train, tokenizer, args.max_length, f"{name} training"),
        held_out=encode_all(held_out[: args.max_held_out], tokenizer, args.max_length, f"{name} held-out"),
    )


def as_text(pair: Example, tokenizer: Any, max_length: int) -> Tokens:
    """A pair as plain text, without the form of a question and its answer: all of it is learnt."""
    ids = list(tokenizer(f"{pair.question}\n{pair.answer}", add_special_tokens=False)["input_ids"])[:max_length]
    return {"input_ids": ids, "labels": list(ids)}


# -- training --------------------------------------------------------------------------------------


def spiel_config(args: argparse.Namespace, seed: int) -> SpIELConfig:
    return SpIELConfig(r=args.r, target_modules="all-linear", task_type="CAUSAL_LM", seed=seed)


def train(
    model: PeftModel,
    rows: list[Tokens],
    steps: int,
    collator: AnswerCollator,
    args: argparse.Namespace,
    *more: TrainerCallback,
) -> float:
    """Train what is trainable; returns the mean training loss."""
    training_args = TrainingArguments(
        output_dir=str(args.output_dir / "trainer"),
        max_steps=steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(6, steps // 2),
        per_device_train_batch_size=args.batch_size,
        use_cpu=not torch.cuda.is_available(),
        seed=args.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    callbacks = [SpIELCallback(), *more]
    trainer = Trainer(model=model, args=training_args, train_dataset=rows, data_collator=collator, callbacks=callbacks)
    return float(trainer.train().training_loss)


def train_task(model: PeftModel, rows: list[Tokens], collator: AnswerCollator, args: argparse.Namespace) -> float:
    """Train the task's deltas on the bare model, on the source language, or on all target languages in turn."""
    if args.task_training == "ready":
        cycler = LanguageCycler(model, args.languages, TASK, seed=args.seed)
        return train(model, rows, args.task_steps, collator, args, LanguageCyclerCallback(cycler))
    active = [TASK] if args.task_training == "separate" else [TASK, args.source]
    activate(model, active, train=[TASK])
    return train(model, rows, args.task_steps, collator, args, KeepActive(active, train=[TASK]))


def measure(model: PeftModel, language: str, held_out: list[Tokens], collator: AnswerCollator) -> dict[str, float]:
    """Held-out loss on a language's pairs of the base model, of each adapter alone, and of both together."""
    with model.disable_adapter():
        losses = {"base": held_out_loss(model, held_out, collator, 8)}
    for name, active in (("language", [language]), ("task", [TASK]), ("both", [language, TASK])):
        activate(model, active)
        losses[name] = held_out_loss(model, held_out, collator, 8)
    return losses


# -- the run ---------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Trains all adapters, measures, prints and saves; returns the losses by language."""
    set_seed(args.seed)
    source = find_model(args.model)
    tokenizer = load_tokenizer(source)
    collator = AnswerCollator(tokenizer.pad_token_id)
    names = [args.source, *args.languages] if args.task_training == "on-top" else args.languages
    data = {name: read_language(name, tokenizer, args) for name in dict.fromkeys([args.source, *args.languages])}
    base = load_base(source, bf16=False, load_in_4bit=False)

    heading("Languages")
    model = get_peft_model(base, spiel_config(args, seed=1), adapter_name=names[0])
    for seed, name in enumerate([*names, TASK], start=1):
        if name != names[0]:
            model.add_adapter(name, spiel_config(args, seed))
    for name in names:
        activate(model, [name], train=[name])
        loss = train(model, data[name].text, args.language_steps, collator, args)
        field(name, f"{len(data[name].text)} texts, training loss {loss:.3f}")

    heading(f"Task, learnt in {args.source} ({args.task_training})")
    loss = train_task(model, data[args.source].pairs, collator, args)
    field(TASK, f"{len(data[args.source].pairs)} pairs, training loss {loss:.3f}")

    heading("Held-out loss in the target languages")
    results = {name: measure(model, name, data[name].held_out, collator) for name in args.languages}
    for name, losses in results.items():
        field(name, ", ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items()))
        field("", overlap(model, [name, TASK]))
    save(model, results, args)
    return results


def save(model: PeftModel, results: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    """Every adapter, and one adapter per language that is the sum of the language and the task."""
    for name in args.languages:
        model.add_weighted_adapter([name, TASK], [1.0, 1.0], f"{name}_{TASK}")
    model.save_pretrained(str(args.output_dir))
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    field("saved", f"{args.output_dir}: adapters, and sums such as {args.languages[0]}_{TASK}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; 0, or 2 after one line on stderr if the input cannot be used."""
    args = parse_args(argv)

    def work() -> None:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        run(args)

    return run_script("zero_shot.py", work, OSError)


if __name__ == "__main__":
    raise SystemExit(main())
