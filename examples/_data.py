"""Question-answer data for the examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spiel_peft.finetune.data import Corpus, Example, InputError, read_corpus, read_jsonl, split_examples
from spiel_peft.finetune.demo import demo_pairs

__all__ = ["Corpus", "Example", "InputError", "read_jsonl", "split_examples"]

IGNORED_LABEL = -100
Tokens = dict[str, list[int]]


def load_corpus(path: Path | None) -> Corpus:
    """The examples of a jsonl file, or of the PyPI package chatterbot-corpus when no file is given."""
    return demo_pairs() if path is None else read_corpus(path)


def read_chatterbot(language: str) -> list[Example]:
    return demo_pairs(language).examples


def render(example: Example, tokenizer: Any) -> tuple[str, str]:
    """(prompt, completion) as text, from the tokenizer's chat template where it has one."""
    eos = tokenizer.eos_token or ""
    if not tokenizer.chat_template:
        lines = [f"{role.capitalize()}: {content}\n" for role, content in example.prompt]
        return "".join(lines) + "Assistant:", f" {example.answer}{eos}"
    messages = example.messages
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    messages.append({"role": "assistant", "content": example.answer})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(prompt):  # a template that writes history differently from a new turn
        return prompt, example.answer + eos
    # The line break that many templates put after the end-of-turn token is nothing to learn.
    return prompt, whole[len(prompt) :].rstrip("\n")


def encode_prompt(prompt: str, tokenizer: Any) -> list[int]:
    """Token ids of a rendered prompt; a template writes its special tokens itself, plain text does not."""
    if tokenizer.chat_template:
        return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(prompt)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode(example: Example, tokenizer: Any, max_length: int) -> Tokens | None:
    """``input_ids`` and ``labels``, the prompt's labels ignored; None if the prompt leaves no room.

    Prompt and answer are tokenized apart, so that the border is exact and the prompt's tokens are
    those that generation will start from. What is too long loses the end of its answer.
    """
    prompt, completion = render(example, tokenizer)
    prompt_ids = encode_prompt(prompt, tokenizer)
    answer_ids = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    answer_ids = answer_ids[: max(0, max_length - len(prompt_ids))]
    if not answer_ids or not prompt_ids:
        return None
    return {"input_ids": prompt_ids + answer_ids, "labels": [IGNORED_LABEL] * len(prompt_ids) + answer_ids}


def encode_text(text: str, tokenizer: Any, max_length: int) -> list[Tokens]:
    """Plain text in blocks of ``max_length`` tokens, all of which are learnt; a last token alone is left out."""
    ids = list(tokenizer(text)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    blocks = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    return [{"input_ids": block, "labels": list(block)} for block in blocks if len(block) > 1]


def encode_all(examples: Iterable[Example], tokenizer: Any, max_length: int, side: str) -> list[Tokens]:
    """The encoded examples, without those whose prompt alone fills ``max_length``."""
    encoded: list[Tokens] = []
    for example in examples:
        if not example.prompt:
            encoded += encode_text(example.answer, tokenizer, max_length)
        elif (tokens := encode(example, tokenizer, max_length)) is not None:
            encoded.append(tokens)
    if not encoded:
        raise InputError(f"every {side} prompt is longer than --max-length {max_length}: raise it")
    return encoded


@dataclass(frozen=True)
class AnswerCollator:
    """Pads a batch on the right to its longest example; padding is neither attended to nor learnt."""

    pad_token_id: int

    def __call__(self, batch: Sequence[Tokens]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, each of shape (batch, longest)."""
        longest = max(len(tokens["input_ids"]) for tokens in batch)

        def padded(rows: Iterable[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

        return {
            "input_ids": padded((t["input_ids"] for t in batch), self.pad_token_id),
            "attention_mask": padded(([1] * len(t["input_ids"]) for t in batch), 0),
            "labels": padded((t["labels"] for t in batch), IGNORED_LABEL),
        }


def answer_tokens(encoded: Iterable[Tokens]) -> int:
    """How many labels are learnt from (or measured on)."""
    return sum(label != IGNORED_LABEL for tokens in encoded for label in tokens["labels"])
