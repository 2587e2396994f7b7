"""The model and data of examples/finetune.py, for measurements."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from _data import AnswerCollator, encode_all, load_corpus, split_examples  # noqa: E402
from _model import find_model, held_out_loss, load_base, load_tokenizer  # noqa: E402

__all__ = ["DemoTask", "held_out_loss", "load_task", "packed_batches", "token_stream"]


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


def token_stream(task: DemoTask) -> Tensor:
    """All training pairs of the task, one after the other: int64 ``[n]``."""
    return torch.tensor([token for example in task.train for token in example["input_ids"]])


def packed_batches(stream: Tensor, batch_size: int, tokens: int) -> list[Tensor]:
    """A stream of tokens cut into full batches ``[batch_size, tokens]``: no padding, every position counts."""
    size = batch_size * tokens
    whole = stream[: stream.numel() // size * size]
    if whole.numel() == 0:
        raise ValueError(f"{stream.numel()} tokens do not fill one batch of {batch_size} x {tokens}")
    return list(whole.view(-1, batch_size, tokens))
