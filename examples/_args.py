"""The command line of finetune.py."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

DEFAULT_R = 16
DEFAULT_MAX_STEPS = 50


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line instead of after the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_int(text: str) -> int:
    """An int of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def positive_float(text: str) -> float:
    """A finite number above zero."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def non_negative_int(text: str) -> int:
    """An int of at least zero."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def share(text: str) -> float:
    """A number strictly between zero and one."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a wrong one."""
    parser = _Parser(
        prog="finetune.py",
        description="Fine-tune a causal LM with SpIEL on question-answer pairs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_data(parser.add_argument_group("model and data"))
    _add_spiel(parser.add_argument_group("SpIEL"))
    _add_training(parser.add_argument_group("training"))
    args = parser.parse_args(argv)
    if args.r is args.density is args.num_deltas is None:
        args.r = DEFAULT_R
    if args.max_steps is args.epochs is None:
        args.max_steps = DEFAULT_MAX_STEPS
    return args


def _add_data(group: argparse._ArgumentGroup) -> None:
    """What is read and written."""
    add = group.add_argument
    add("--model", metavar="ID_OR_DIR", help="folder, .gguf file or hub id; None: SmolLM2-135M-Instruct")
    add("--data", type=Path, metavar="FILE", help="jsonl file; None: the English part of chatterbot-corpus")
    add("--held-out", type=share, default=0.1, help="share of the questions held out")
    add("--max-held-out", type=positive_int, default=200, help="held-out pairs to measure on, at most")
    add("--max-length", type=positive_int, default=128, help="tokens of a pair; longer answers are cut")
    add("--output-dir", type=Path, default=Path("outputs/finetune"), help="folder for everything written")
    add("--no-merge", action="store_true", help="do not save the merged checkpoint")


def _add_spiel(group: argparse._ArgumentGroup) -> None:
    """What SpIELConfig takes; it checks the values itself."""
    budget = group.add_mutually_exclusive_group()
    rank_help = f"as many deltas as LoRA of this rank has ({DEFAULT_R} without a budget)"
    budget.add_argument("--r", type=positive_int, help=rank_help)
    budget.add_argument("--density", type=float, help="share of each weight that gets a delta")
    budget.add_argument("--num-deltas", type=positive_int, help="deltas in the whole model")
    add = group.add_argument
    add("--target-modules", nargs="+", default=["all-linear"], metavar="NAME", help="modules to adapt")
    add("--growth", default="accumulated_gradient", help="or momentum, random, none")
    add("--regrow-every", type=positive_int, default=10, help="optimizer steps from close to close")
    add("--accumulation-steps", type=positive_int, default=5, help="steps that scores are summed over")


def _add_training(group: argparse._ArgumentGroup) -> None:
    """What the Trainer takes."""
    length = group.add_mutually_exclusive_group()
    steps_help = f"optimizer steps ({DEFAULT_MAX_STEPS} without --epochs)"
    length.add_argument("--max-steps", type=positive_int, help=steps_help)
    length.add_argument("--epochs", type=positive_float, help="passes over the training pairs")
    add = group.add_argument
    add("--learning-rate", type=positive_float, default=5e-4, help="peak, after warm-up; falls linearly")
    add("--warmup-steps", type=non_negative_int, default=10, help="optimizer steps")
    add("--batch-size", type=positive_int, default=4, help="pairs in a forward pass")
    add("--grad-accum", type=positive_int, default=1, help="forward passes per optimizer step")
    add("--eval-every", type=positive_int, default=25, help="steps between held-out measurements")
    add("--seed", type=non_negative_int, default=0, help="of the data order and of SpIEL's choices")
    add("--bf16", action="store_true", help="base weights and autocast in bfloat16")
    add("--load-in-4bit", action="store_true", help="NF4 base with double quantization (bitsandbytes)")
    add("--gradient-checkpointing", action="store_true", help="less memory, slower")
    add("--max-new-tokens", type=positive_int, default=48, help="length of the sampled answers")
