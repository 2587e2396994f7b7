#!/usr/bin/env python
"""Distillation with a sparse student: a model with half the layers that SpIEL tunes against a tuned teacher.

In the manner of BiStil (Ansell et al., 2023), for a causal language model:

1. The teacher learns the task: the base model with SpIEL's deltas, which are its only trained values.
2. A student with fewer layers, copies of every n-th layer of the base model and of its embeddings, is distilled from
   the base model on plain text. Losses: hidden states and attention matrices of each student layer against those of
   the teacher's layer that it was copied from, and the divergence of the output distributions.
3. The student is frozen and gets SpIEL's deltas, which are tuned with the same losses against the tuned teacher on the
   questions and answers of the task.

Without arguments: SmolLM2-135M-Instruct, 30 layers to 15, on two CPU cores in about a quarter of an hour; few steps, so
expect a student that is on its way rather than one that has arrived.

    python examples/distill.py --layers 10 --distillation-steps 500
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, get_linear_schedule_with_warmup, set_seed

from _args import _Parser, positive_float, positive_int
from _data import IGNORED_LABEL, AnswerCollator, InputError, Tokens, encode_all, load_corpus, split_examples
from _model import find_model, held_out_loss, load_base, load_tokenizer
from _report import Clock, field, heading
from _script import run_script
from spiel_peft import SpIELConfig, SpIELOptimizer

Batch = dict[str, Tensor]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a wrong one."""
    parser = _Parser(
        prog="distill.py",
        description="Distil a causal LM into one of fewer layers, and tune that with SpIEL.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", metavar="ID_OR_DIR", help="folder, .gguf file or hub id; None: SmolLM2-135M-Instruct")
    add("--data", type=Path, metavar="FILE", help="jsonl file of pairs; None: the English part of chatterbot-corpus")
    add("--text", type=Path, metavar="FILE", help="plain text, a line each, to distil on; None: the pairs as text")
    add("--layers", type=positive_int, help="layers of the student; None: half of the teacher's")
    add("--r", type=positive_int, default=16, help="as many deltas as LoRA of this rank has")
    add("--teacher-steps", type=positive_int, default=40, help="optimizer steps of the teacher's deltas")
    add("--distillation-steps", type=positive_int, default=100, help="optimizer steps of the whole student")
    add("--student-steps", type=positive_int, default=60, help="optimizer steps of the student's deltas")
    add("--learning-rate", type=positive_float, default=5e-4, help="peak learning rate")
    add("--batch-size", type=positive_int, default=4, help="examples per batch")
    add("--max-length", type=positive_int, default=64, help="tokens of an example; longer ones are cut")
    add("--max-held-out", type=positive_int, default=60, help="held-out pairs, at most")
    add("--output-dir", type=Path, default=Path("outputs/distill"), help="folder for models, adapters and results")
    add("--seed", type=int, default=0, help="seed of everything random")
    return parser.parse_args(argv)


# -- the student -----------------------------------------------------------------------------------


def teacher_layers(teacher: int, student: int) -> list[int]:
    """For each of the student's layers the teacher's layer that it is made from: every n-th, the last one included.

    Raises:
        ValueError: the student would have as many layers as the teacher, or more.
    """
    if not 0 < student < teacher:
        raise ValueError(f"a student of {student} layers needs a teacher of more, this one has {teacher}")
    return [(i + 1) * teacher // student - 1 for i in range(student)]


def make_student(teacher: PreTrainedModel, chosen: Sequence[int]) -> PreTrainedModel:
    """A model like the teacher of only the chosen layers, with copies of their weights and of all others."""
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(chosen)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in chosen]
    student = type(teacher)(config).to(dtype=teacher.dtype, device=teacher.device)
    place = {str(number): str(i) for i, number in enumerate(chosen)}
    weights = {}
    for name, tensor in teacher.state_dict().items():
        parts = name.split(".")
        if "layers" in parts:
            at = parts.index("layers") + 1
            if parts[at] not in place:
                continue
            parts[at] = place[parts[at]]
        weights[".".join(parts)] = tensor
    student.load_state_dict(weights)
    return student


# -- the losses ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Views:
    """What a model makes of a batch: hidden states and attention of each layer, and logits."""

    hidden: Sequence[Tensor]
    attention: Sequence[Tensor]
    logits: Tensor


def look(model: torch.nn.Module, batch: Batch, chosen: Sequence[int] | None = None) -> Views:
    """Run a model; of all layers, or only of those chosen."""
    out = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
        output_hidden_states=True,
        output_attentions=True,
    )
    hidden = out.hidden_states[1:]  # the first are the embeddings
    picked = range(len(hidden)) if chosen is None else chosen
    return Views([hidden[i] for i in picked], [out.attentions[i] for i in picked], out.logits)


def hidden_loss(student: Views, teacher: Views, real: Tensor) -> Tensor:
    """Squared error of the hidden states ``[batch, length, width]`` at real tokens, mean over layers.

    Relative to the token's mean square in the teacher: in models like LLaMA a few tokens have states a hundred times
    as large as all others, which would be all that is learnt.
    """
    losses = []
    for mine, theirs in zip(student.hidden, teacher.hidden, strict=True):
        error = (mine - theirs).square().mean(-1) / theirs.square().mean(-1)
        losses.append(error[real].mean())
    return torch.stack(losses).mean()


def attention_loss(student: Views, teacher: Views, real: Tensor) -> Tensor:
    """Squared error of the attention ``[batch, heads, queries, keys]`` of real tokens, summed over keys."""
    losses = []
    for mine, theirs in zip(student.attention, teacher.attention, strict=True):
        error = (mine - theirs).square().sum(-1).mean(1)
        losses.append(error[real].mean())
    return torch.stack(losses).mean()


def output_loss(student: Views, teacher: Views, learnt: Tensor) -> Tensor:
    """Divergence of the student's next tokens from the teacher's in nats, at positions ``learnt [batch, length]``."""
    mine, theirs = student.logits[learnt].log_softmax(-1), teacher.logits[learnt].log_softmax(-1)
    return (theirs.exp() * (theirs - mine)).sum(-1).mean()


def predicts_labels(batch: Batch) -> Tensor:
    """Positions ``[batch, length]`` from which a token with a label is predicted: the one before each."""
    learnt = batch["labels"] != IGNORED_LABEL
    return torch.cat([learnt[:, 1:], torch.zeros_like(learnt[:, :1])], dim=1)


def distillation_loss(
    student: torch.nn.Module, teacher: torch.nn.Module, batch: Batch, chosen: Sequence[int]
) -> Tensor:
    """The sum of the three losses on a batch; no gradient reaches the teacher."""
    with torch.no_grad():
        theirs = look(teacher.eval(), batch, chosen)
    mine = look(student, batch)
    real = batch["attention_mask"].bool()
    layers = hidden_loss(mine, theirs, real) + attention_loss(mine, theirs, real)
    return layers + output_loss(mine, theirs, predicts_labels(batch))


# -- training --------------------------------------------------------------------------------------


def batches(rows: Sequence[Tokens], collator: AnswerCollator, size: int, seed: int, device: Any) -> Iterator[Batch]:
    """Endless batches of the rows in an order that the seed gives."""
    order = random.Random(seed)
    while True:
        shuffled = order.sample(list(rows), len(rows))
        for start in range(0, len(shuffled), size):
            yield {name: tensor.to(device) for name, tensor in collator(shuffled[start : start + size]).items()}


def train(
    model: torch.nn.Module, loss_of: Callable[[Batch], Tensor], data: Iterator[Batch], steps: int, learning_rate: float
) -> list[float]:
    """Train what is trainable; deltas, if there are some, go through SpIEL's cycle. Returns the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    if isinstance(model, PeftModel):
        optimizer = SpIELOptimizer(optimizer, model, total_steps=steps)
    scheduler = get_linear_schedule_with_warmup(optimizer, min(10, steps // 2), steps)
    losses = []
    model.train()
    for batch in itertools.islice(data, steps):
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def with_deltas(model: PreTrainedModel, args: argparse.Namespace) -> PeftModel:
    """The model frozen, with deltas on all linear layers."""
    config = SpIELConfig(r=args.r, target_modules="all-linear", task_type="CAUSAL_LM", seed=args.seed, regrow_every=10)
    return get_peft_model(model, config)


def tune_teacher(
    base: PreTrainedModel, data: Iterator[Batch], args: argparse.Namespace
) -> tuple[PeftModel, list[float]]:
    """Step 1: the task's deltas on the base model, learnt from labels."""
    teacher = with_deltas(base, args)
    losses = train(
        teacher, lambda batch: teacher(**batch, use_cache=False).loss, data, args.teacher_steps, args.learning_rate
    )
    return teacher, losses


def distil(
    student: PreTrainedModel, teacher: PeftModel, data: Iterator[Batch], chosen: Sequence[int], args: argparse.Namespace
) -> list[float]:
    """Step 2: all weights of the student's layers, against the teacher without its deltas."""
    student.requires_grad_(True)
    for embedding in (student.get_input_embeddings(), student.get_output_embeddings()):
        embedding.requires_grad_(False)  # the teacher's, which its states are read with

    def loss(batch: Batch) -> Tensor:
        with teacher.disable_adapter():
            return distillation_loss(student, teacher, batch, chosen)

    return train(student, loss, data, args.distillation_steps, args.learning_rate)


def tune_student(
    student: PreTrainedModel, teacher: PeftModel, data: Iterator[Batch], chosen: Sequence[int], args: argparse.Namespace
) -> tuple[PeftModel, list[float]]:
    """Step 3: the student's deltas, and nothing else of it, against the teacher with its deltas."""
    tuned = with_deltas(student, args)
    losses = train(
        tuned,
        lambda batch: distillation_loss(tuned, teacher, batch, chosen),
        data,
        args.student_steps,
        args.learning_rate,
    )
    return tuned, losses


# -- the run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Plain text, and the task's pairs."""

    text: list[Tokens]
    pairs: list[Tokens]
    held_out: list[Tokens]


def read_data(tokenizer: Any, args: argparse.Namespace) -> Data:
    """Pairs split by question, and text. Raises InputError."""
    train_pairs, held_out = split_examples(load_corpus(args.data).examples, 0.1)
    if args.text is None:
        lines = [f"{pair.question}\n{pair.answer}" for pair in train_pairs]
    else:
        lines = [line for line in args.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    encoded = [tokenizer(line, add_special_tokens=False)["input_ids"][: args.max_length] for line in lines]
    text = [{"input_ids": list(ids), "labels": list(ids)} for ids in encoded if len(ids) > 1]
    if not text:
        raise InputError(f"{args.text}: no line with at least two tokens in it")
    return Data(
        text=text,
        pairs=encode_all(train_pairs, tokenizer, args.max_length, "training"),
        held_out=encode_all(held_out[: args.max_held_out], tokenizer, args.max_length, "held-out"),
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains teacher and student, measures, prints and saves; returns the results."""
    set_seed(args.seed)
    clock = Clock()
    source = find_model(args.model)
    tokenizer = load_tokenizer(source)
    collator = AnswerCollator(tokenizer.pad_token_id)
    data = read_data(tokenizer, args)
    base = load_base(source, bf16=False, load_in_4bit=False)
    base.set_attn_implementation("eager")  # the only one that shows its attention
    depth = base.config.num_hidden_layers
    try:
        chosen = teacher_layers(depth, args.layers or max(1, depth // 2))
    except ValueError as error:
        raise InputError(f"--layers: {error}") from None

    def feed(rows: list[Tokens], seed: int) -> Iterator[Batch]:
        return batches(rows, collator, args.batch_size, args.seed + seed, base.device)

    def measure(name: str, model: torch.nn.Module) -> None:
        results[name] = held_out_loss(model, data.held_out, collator, 8)
        field(name, f"held-out loss {results[name]:.3f}")

    results: dict[str, Any] = {"layers": chosen}
    heading(f"Teacher: {depth} layers, {args.teacher_steps} steps of SpIEL")
    student = make_student(base, chosen)
    measure("base", base)
    teacher, results["teacher_losses"] = tune_teacher(base, feed(data.pairs, 0), args)
    measure("teacher", teacher)
    clock.lap("teacher")

    heading(f"Student: layers {', '.join(map(str, chosen))}, {args.distillation_steps} steps of distillation on text")
    measure("student_made", student)
    results["distillation_losses"] = distil(student, teacher, feed(data.text, 1), chosen, args)
    measure("student_distilled", student)
    student.save_pretrained(str(args.output_dir / "student"))
    clock.lap("distillation")

    heading(f"Student's deltas: {args.student_steps} steps of SpIEL against the tuned teacher")
    tuned, results["student_losses"] = tune_student(student, teacher, feed(data.pairs, 2), chosen, args)
    measure("student_tuned", tuned)
    clock.lap("student")
    save(tuned, teacher, tokenizer, results, args)
    field("time", clock)
    return results


def save(
    student: PeftModel, teacher: PeftModel, tokenizer: Any, results: dict[str, Any], args: argparse.Namespace
) -> None:
    trained, total = student.get_nb_trainable_parameters()
    field("trained", f"{trained:,} values on {total - trained:,} of the student")
    student.save_pretrained(str(args.output_dir / "student_adapter"))
    teacher.save_pretrained(str(args.output_dir / "teacher_adapter"))
    tokenizer.save_pretrained(str(args.output_dir / "student"))
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    field("saved", f"{args.output_dir}: student, student_adapter, teacher_adapter, results.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; 0, or 2 after one line on stderr if the input cannot be used."""
    args = parse_args(argv)

    def work() -> None:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        run(args)

    return run_script("distill.py", work, OSError)


if __name__ == "__main__":
    raise SystemExit(main())
