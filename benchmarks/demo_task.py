"""The model and data of examples/finetune.py, for measurements."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from _data import AnswerCollator, encode_all, load_corpus, split_examples  # noqa: E402
from _model import find_model, held_out_loss, load_base, load_tokenizer  # noqa: E402

__all__ = ["DemoTask", "held_out_loss", "load_task"]


@dataclass(frozen=True)
class DemoTask:
    """SmolLM2-135M-Instruct (float32) and tokenized English question-answer pairs."""

    model: Any
    train: list[Any]
    held_out: list[Any]
    collator: Any


def load_task(max_held_out: int = 200, max_length: int = 128) -> DemoTask:
    source = find_model(None)
    train, held_out = split_examples(load_corpus(None).examples, 0.1)
    tokenizer = load_tokenizer(source)
    return DemoTask(
        model=load_base(source, bf16=False, load_in_4bit=False),
        train=encode_all(train, tokenizer, max_length, "training"),
        held_out=encode_all(held_out[:max_held_out], tokenizer, max_length, "held-out"),
        collator=AnswerCollator(tokenizer.pad_token_id),
    )
