"""The model and data of the demo, for measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spiel_peft.finetune.base_model import load_base, load_tokenizer
from spiel_peft.finetune.data import Example, split_examples
from spiel_peft.finetune.demo import demo_model, demo_pairs


@dataclass(frozen=True)
class DemoTask:
    """SmolLM2-135M-Instruct (float32), and all its training pairs one after the other: int64 ``[n]``."""

    model: Any
    stream: Tensor


def load_task(max_length: int = 128) -> DemoTask:
    """The task; pairs longer than `max_length` tokens are cut."""
    source = demo_model()
    train, _ = split_examples(demo_pairs().examples, 0.1)
    tokenizer = load_tokenizer(source)
    stream = [token for example in train for token in _tokens(example, tokenizer)[:max_length]]
    return DemoTask(load_base(source, bf16=False, load_in_4bit=False), torch.tensor(stream))


def _tokens(example: Example, tokenizer: Any) -> list[int]:
    messages = [*example.messages, {"role": "assistant", "content": example.answer}]
    return list(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])


def packed_batches(stream: Tensor, batch_size: int, tokens: int) -> list[Tensor]:
    """A stream of tokens cut into full batches ``[batch_size, tokens]``: no padding, every position counts."""
    size = batch_size * tokens
    whole = stream[: stream.numel() // size * size]
    if whole.numel() == 0:
        raise ValueError(f"{stream.numel()} tokens do not fill one batch of {batch_size} x {tokens}")
    return list(whole.view(-1, batch_size, tokens))
