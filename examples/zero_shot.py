#!/usr/bin/env python
"""Zero-shot transfer by adding sparse deltas: a task learnt in one language, answered in others.

One adapter per language learns from plain text, one adapter learns the task (answering questions) from the pairs of the
source language alone. Then the deltas of a target language and of the task are active together (Ansell et al., 2022),
although no question was ever asked in that language in training. Without arguments: SmolLM2-135M-Instruct and the
dialogues of chatterbot-corpus, on a CPU.

    python examples/zero_shot.py --task-training separate   # the task on the bare model
    python examples/zero_shot.py --task-training on-top     # on the source language's frozen deltas
    python examples/zero_shot.py --task-training ready      # the target languages take turns (Parović et al., 2023)
"""

import argparse
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import get_peft_model
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from spiel_peft import KeepActive, LanguageCycler, LanguageCyclerCallback, SpIELCallback, SpIELConfig, activate, overlap
from spiel_peft.finetune.base_model import demo_model, find_model, load_base, load_tokenizer
from spiel_peft.finetune.data import Example, demo_pairs, read_corpus, rows_that_fit, split_examples

TASK = "task"
LENGTH = 96  # tokens of an example; longer ones are cut


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder, .gguf file or hub id; SmolLM2-135M-Instruct by default")
    add("--data-dir", type=Path, help="folder with a LANGUAGE.jsonl of pairs each; chatterbot-corpus by default")
    add("--source", default="english", help="language in which the task is learnt")
    add("--languages", nargs="+", default=["italian", "spanish"], help="languages to transfer to")
    add("--task-training", choices=["separate", "on-top", "ready"], default="ready", help="what is under the task")
    add("--r", type=int, default=16, help="as many deltas as LoRA of this rank has")
    add("--language-steps", type=int, default=30, help="optimizer steps per language")
    add("--task-steps", type=int, default=30, help="optimizer steps of the task")
    add("--learning-rate", type=float, default=5e-4)
    add("--output-dir", type=Path, default=Path("outputs/zero_shot"))
    args = parser.parse_args(argv)
    if len({args.source, *args.languages}) <= len(args.languages):
        parser.error("--languages must be distinct, and other than --source")
    return args


def as_text(examples: list[Example], tokenizer: Any) -> Dataset:
    """Pairs as tokens of plain text, without chat template and end of turn: the task learns where an answer ends."""
    texts = [f"{example.question}\n{example.answer}" for example in examples]
    return Dataset.from_dict({"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]})


class Run:
    """One model with the adapters of all languages and the task: trains and measures them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        source = demo_model() if args.model is None else find_model(args.model)
        self.tokenizer = load_tokenizer(source)
        self.pairs = {name: split_examples(self.read(name), 0.2) for name in (args.source, *args.languages)}
        self.names = [args.source, *args.languages] if args.task_training == "on-top" else args.languages
        base = load_base(source, bf16=False, load_in_4bit=False)
        self.model: Any = get_peft_model(base, self.config(seed=1), adapter_name=self.names[0])
        for seed, name in enumerate([*self.names[1:], TASK], start=2):
            self.model.add_adapter(name, self.config(seed))

    def read(self, language: str) -> list[Example]:
        folder = self.args.data_dir
        return (demo_pairs(language) if folder is None else read_corpus(folder / f"{language}.jsonl")).examples

    def config(self, seed: int) -> SpIELConfig:
        return SpIELConfig(r=self.args.r, target_modules="all-linear", task_type="CAUSAL_LM", seed=seed)

    def rows(self, examples: list[Example]) -> Dataset:
        return Dataset.from_list(rows_that_fit(examples, self.tokenizer, LENGTH, "task"))

    def trainer(self, rows: Dataset, steps: int, *callbacks: TrainerCallback) -> SFTTrainer:
        """A trainer of the parameters that are trainable when it is made."""
        arguments = SFTConfig(
            str(self.args.output_dir / "trainer"),
            max_steps=steps,
            warmup_steps=min(6, steps // 2),
            learning_rate=self.args.learning_rate,
            per_device_train_batch_size=4,
            max_length=LENGTH,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
        )
        made = {"args": arguments, "train_dataset": rows, "processing_class": self.tokenizer}
        return SFTTrainer(self.model, **made, callbacks=[SpIELCallback(), *callbacks])

    def train_task(self) -> SFTTrainer:
        """Train the task's deltas on the bare model, on the source language, or on all target languages in turn."""
        rows = self.rows(self.pairs[self.args.source][0])
        if self.args.task_training == "ready":
            callback = LanguageCyclerCallback(LanguageCycler(self.model, self.args.languages, TASK, seed=0))
        else:
            active = [TASK] if self.args.task_training == "separate" else [TASK, self.args.source]
            activate(self.model, active, train=[TASK])
            callback = KeepActive(active, train=[TASK])
        trainer = self.trainer(rows, self.args.task_steps, callback)
        trainer.train()
        return trainer

    def measure(self, language: str) -> dict[str, float]:
        """Held-out loss on a language's pairs of the base model, of each adapter alone, and of both together."""
        rows = self.rows(self.pairs[language][1])
        evaluator, losses = self.trainer(rows, 1), {}
        for name, active in (("language", [language]), ("task", [TASK]), ("both", [language, TASK])):
            activate(self.model, active)
            losses[name] = evaluator.evaluate(rows)["eval_loss"]
        with self.model.disable_adapter():
            return {"base": evaluator.evaluate(rows)["eval_loss"], **losses}


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Train all adapters, print the held-out losses and save; returns the losses by language."""
    run = Run(parse_args(argv))
    args, model = run.args, run.model
    for name in run.names:
        activate(model, [name], train=[name])
        run.trainer(as_text(run.pairs[name][0], run.tokenizer), args.language_steps).train()
    run.train_task()
    results = {language: run.measure(language) for language in args.languages}
    for name, losses in results.items():
        print(f"{name}: held-out loss " + ", ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items()))
        print(overlap(model, [name, TASK]))
        model.add_weighted_adapter([name, TASK], [1.0, 1.0], f"{name}_{TASK}")  # one file holds the sum
    model.save_pretrained(str(args.output_dir))
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
