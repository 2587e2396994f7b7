#!/usr/bin/env python
"""Distillation with a sparse student, in the manner of BiStil (Ansell et al., 2023), for a causal language model.

1. The teacher learns the task: the base model with SpIEL's deltas, which are its only trained values.
2. A student of copies of every n-th layer of the base model is distilled from the base model on plain text. Losses:
   hidden states and attention of each layer against those of the layer it was copied from, and the outputs' divergence.
3. The student is frozen and gets deltas of its own, tuned with the same losses against the tuned teacher on the task.

    python examples/distill.py     # SmolLM2-135M-Instruct, 30 layers to 15, on chatterbot-corpus
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer

from spiel_peft import SpIELConfig
from spiel_peft.finetune.base_model import demo_model, find_model, load_base, load_tokenizer
from spiel_peft.finetune.data import demo_pairs, read_corpus, rows_that_fit, split_examples

LENGTH = 64  # tokens of an example; longer ones are cut


def teacher_layers(teacher: int, student: int) -> list[int]:
    """Choose the teacher's layers that the student copies: every n-th, with the last one."""
    if not 0 < student < teacher:
        raise ValueError(f"--layers: a student of {student} layers needs a teacher of more, this one has {teacher}")
    return [(i + 1) * teacher // student - 1 for i in range(student)]


def make_student(teacher: Any, chosen: list[int]) -> Any:
    """A copy of the teacher with only the chosen layers."""
    student = copy.deepcopy(teacher)
    student.model.layers = nn.ModuleList([student.model.layers[number] for number in chosen])
    for place, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = place
    student.config.num_hidden_layers = len(chosen)
    if types := getattr(student.config, "layer_types", None):
        student.config.layer_types = [types[number] for number in chosen]
    return student


def hidden_error(mine: Tensor, theirs: Tensor) -> Tensor:
    """Squared error of states ``[batch, length, width]`` per token, over their mean square, as that varies widely."""
    return (mine - theirs).square().mean(-1) / theirs.square().mean(-1)


def attention_error(mine: Tensor, theirs: Tensor) -> Tensor:
    """Squared error of attention ``[batch, heads, queries, keys]`` by query: summed over keys, mean over heads."""
    return (mine - theirs).square().sum(-1).mean(1)


def divergence(mine: Tensor, theirs: Tensor, labels: Tensor) -> Tensor:
    """KL divergence in nats of the student's logits from the teacher's, at the tokens before those with a label."""
    learnt = labels[:, 1:] != -100
    mine, theirs = (logits[:, :-1][learnt].log_softmax(-1) for logits in (mine, theirs))
    return (theirs.exp() * (theirs - mine)).sum(-1).mean()


def distillation_loss(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], chosen: list[int]) -> Tensor:
    """The sum of the three losses on a batch; the teacher gets no gradient."""
    seen = {name: batch[name] for name in ("input_ids", "attention_mask")}
    shown = {"use_cache": False, "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        theirs = teacher.eval()(**seen, **shown)
    mine, real, layers = student(**seen, **shown), seen["attention_mask"].bool(), 0.0
    for own, copied in enumerate(chosen):  # the first hidden states are the embeddings
        layers += hidden_error(mine.hidden_states[own + 1], theirs.hidden_states[copied + 1])[real].mean()
        layers += attention_error(mine.attentions[own], theirs.attentions[copied])[real].mean()
    return layers / len(chosen) + divergence(mine.logits, theirs.logits, batch["labels"])


class Distiller(SFTTrainer):
    """TRL's SFTTrainer with these losses in training; evaluation is on labels, as in SFTTrainer."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        return distillation_loss(model, self.teacher, inputs, self.chosen)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train teacher and student, save them, and return the held-out losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, .gguf file or hub id; SmolLM2-135M-Instruct by default")
    parser.add_argument("--data", type=Path, help="jsonl file of pairs; chatterbot-corpus by default")
    parser.add_argument("--layers", type=int, help="layers of the student; half of the teacher's by default")
    # So briefly distilled a student is fragile: its deltas want a low rate (1e-4 makes it worse).
    for phase, steps, rate in (("teacher", 40, 5e-4), ("distillation", 100, 5e-4), ("student", 60, 3e-5)):
        parser.add_argument(f"--{phase}-steps", type=int, default=steps)
        parser.add_argument(f"--{phase}-learning-rate", type=float, default=rate)
    parser.add_argument("--r", type=int, default=16, help="as many deltas as LoRA of this rank has")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/distill"))
    args = parser.parse_args(argv)
    source = demo_model() if args.model is None else find_model(args.model)
    tokenizer = load_tokenizer(source)
    pairs, held_out = split_examples((demo_pairs() if args.data is None else read_corpus(args.data)).examples, 0.1)
    text = Dataset.from_list([{"text": f"{pair.question}\n{pair.answer}"} for pair in pairs])
    task, test = (Dataset.from_list(rows_that_fit(part, tokenizer, LENGTH, "task")) for part in (pairs, held_out))
    base = load_base(source, bf16=False, load_in_4bit=False)
    base.set_attn_implementation("eager")  # the only implementation that returns attention probabilities
    chosen = teacher_layers(base.config.num_hidden_layers, args.layers or base.config.num_hidden_layers // 2)
    student = make_student(base, chosen)
    settings = {"completion_only_loss": True, "max_length": LENGTH, "per_device_train_batch_size": 4}
    settings |= {"gradient_checkpointing": False, "bf16": False, "save_strategy": "no", "report_to": "none"}
    deltas = {"r": args.r, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "regrow_every": 10}
    folder, losses = str(args.output_dir / "trainer"), {}

    def trainer(kind: type[SFTTrainer], model: Any, rows: Dataset, steps: int, rate: float, sparse: bool = True) -> Any:
        length = {"learning_rate": rate, "max_steps": steps, "warmup_steps": min(10, steps // 2)}
        arguments, config = SFTConfig(folder, **length, **settings), SpIELConfig(**deltas) if sparse else None
        return kind(model, arguments, None, rows, test, tokenizer, peft_config=config)

    def measure(name: str, run: SFTTrainer) -> None:
        losses[name] = run.evaluate()["eval_loss"]
        print(f"{name}: held-out loss {losses[name]:.3f}", flush=True)

    run = trainer(SFTTrainer, base, task, args.teacher_steps, args.teacher_learning_rate)
    measure("base", run)
    run.train()
    measure("teacher", run)
    teacher = run.model
    student.requires_grad_(False).model.layers.requires_grad_(True)  # embeddings and head stay the teacher's
    run = trainer(Distiller, student, text, args.distillation_steps, args.distillation_learning_rate, False)
    run.teacher, run.chosen = teacher, chosen
    measure("student_made", run)
    with teacher.disable_adapter():
        run.train()
    measure("student_distilled", run)
    student.save_pretrained(args.output_dir / "student")
    tokenizer.save_pretrained(args.output_dir / "student")

    run = trainer(Distiller, student, task, args.student_steps, args.student_learning_rate)
    run.teacher, run.chosen = teacher, chosen
    run.train()
    measure("student_tuned", run)
    run.model.save_pretrained(args.output_dir / "student_adapter")
    teacher.save_pretrained(args.output_dir / "teacher_adapter")
    return losses


if __name__ == "__main__":
    main()
