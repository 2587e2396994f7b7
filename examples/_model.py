"""Base models for the examples: the default one, and measuring and asking them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from _data import IGNORED_LABEL, AnswerCollator, Tokens
from spiel_peft.finetune import base_model
from spiel_peft.finetune.base_model import ModelSource, load_base, load_tokenizer
from spiel_peft.finetune.demo import demo_model

__all__ = [
    "ModelSource",
    "find_model",
    "held_out_loss",
    "load_base",
    "load_tokenizer",
]


def find_model(name: str | None) -> ModelSource:
    """The source that ``--model`` names: a folder, a .gguf file, or a hub id; None: the demo model."""
    return demo_model() if name is None else base_model.find_model(name)


@torch.no_grad()
def held_out_loss(model: Any, encoded: Sequence[Tokens], collator: AnswerCollator, batch_size: int) -> float:
    """Cross entropy in nats per answer token, every token counting the same."""
    was_training = model.training
    model.eval()
    by_length = sorted(encoded, key=lambda tokens: len(tokens["input_ids"]))  # little padding
    total, count = 0.0, 0
    for start in range(0, len(by_length), batch_size):
        batch = {k: v.to(model.device) for k, v in collator(by_length[start : start + batch_size]).items()}
        learnt = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
        total += float(model(**batch, use_cache=False).loss) * learnt
        count += learnt
    model.train(was_training)
    return total / count if count else math.nan
