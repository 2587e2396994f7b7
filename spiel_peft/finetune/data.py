"""Text to fine-tune on: reading, splitting, and tokens with labels on what is to be learnt only."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

IGNORED_LABEL = -100  # what PyTorch's and transformers' cross entropy leaves out
ROLES = ("system", "user", "assistant", "tool")

Message = dict[str, str]
Tokens = dict[str, list[int]]


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what and where."""


@dataclass(frozen=True)
class Example:
    """One answer to learn, and the conversation that leads up to it; without one, plain text to learn."""

    prompt: tuple[tuple[str, str], ...]  # (role, content), ending with a turn that is not the assistant's
    answer: str

    @property
    def question(self) -> str:
        """The turn that the answer replies to; plain text itself."""
        return self.prompt[-1][1] if self.prompt else self.answer

    @property
    def messages(self) -> list[Message]:
        """The prompt in the form that chat templates take."""
        return [{"role": role, "content": content} for role, content in self.prompt]


@dataclass(frozen=True)
class Corpus:
    """The distinct examples of one source, and what was left out of it."""

    source: str
    examples: list[Example]
    blank: int
    duplicates: int


# -- reading ---------------------------------------------------------------------------------------


def read_examples(path: Path) -> Corpus:
    """The distinct examples of a file: text whose paragraphs are divided by blank lines (``.txt``), or jsonl."""
    examples = read_texts(path) if path.suffix == ".txt" else read_jsonl(path, texts=True)
    return distinct(str(path), examples)


def distinct(source: str, examples: Sequence[Example]) -> Corpus:
    """Leave out blank examples and repetitions. Raises InputError if nothing is left."""
    filled = [e for e in examples if e.question.strip() and e.answer.strip()]
    kept = list(dict.fromkeys(filled))
    if not kept:
        raise InputError(f"{source}: no usable question-answer pairs ({len(examples)} read, all of them blank)")
    return Corpus(source, kept, len(examples) - len(filled), len(filled) - len(kept))


def read_texts(path: Path) -> list[Example]:
    """The paragraphs of a text file."""
    try:
        text = _read(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text)]
    examples = [Example((), part) for part in paragraphs if part]
    if not examples:
        raise InputError(f"{path}: holds no text")
    return examples


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"--data {path}: {error.strerror or error}") from None


def read_jsonl(path: Path, texts: bool = False) -> list[Example]:
    """All examples of a jsonl file with one object per line, in any mixture of three forms.

    ``{"question": ..., "answer": ...}``, ``{"prompt": ..., "completion": ...}``, or
    ``{"messages": [{"role": ..., "content": ...}, ...]}``, which gives one example per assistant turn.

    Args:
        texts: take ``{"text": ...}`` too, all of which is learnt.
    """
    lines = _read(path).splitlines()
    examples: list[Example] = []
    for number, line in enumerate(lines, start=1):
        examples.extend(_parse_line(line, f"{path}:{number}", texts))
    if not examples:
        raise InputError(f"{path}: no question-answer pairs in {len(lines)} lines")
    return examples


def _parse_line(line: bytes, where: str, texts: bool) -> Iterator[Example]:
    """The examples in one line of a jsonl file; ``where`` is its file and number, for errors."""
    try:
        text = line.decode("utf-8-sig")  # some editors begin a file with a byte order mark
        if not text.strip():
            return
        record = json.loads(text)
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not a JSON object: {error.msg} (column {error.colno})") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(record).__name__}")
    for question, answer in (("question", "answer"), ("prompt", "completion")):
        if question in record and answer in record:
            prompt = (("user", _text(record[question], question, where)),)
            yield Example(prompt, _text(record[answer], answer, where))
            return
    if texts and "text" in record:
        yield Example((), _text(record["text"], "text", where))
        return
    if "messages" not in record:
        expected = '"question" and "answer", "prompt" and "completion", or "messages"'
        expected += ', or "text"' if texts else ""
        raise InputError(f"{where}: expected {expected}; found {', '.join(map(repr, record)) or 'nothing'}")
    yield from _parse_messages(record["messages"], where)


def _parse_messages(messages: Any, where: str) -> Iterator[Example]:
    """One example per assistant turn of a conversation, each with the turns before it as its prompt."""
    if not isinstance(messages, list):
        raise InputError(f'{where}: "messages" must be a list, got {type(messages).__name__}')
    turns: list[tuple[str, str]] = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise InputError(f'{where}: every message needs a "role" out of {", ".join(ROLES)}')
        role, content = message["role"], _text(message.get("content"), "content", where)
        if role == "assistant" and turns and turns[-1][0] in ("user", "tool"):
            yield Example(tuple(turns), content)
        turns.append((role, content))


def _text(value: Any, key: str, where: str) -> str:
    """``value`` if it is a string; an error that names the key and the line otherwise."""
    if not isinstance(value, str):
        raise InputError(f'{where}: "{key}" must be a string, got {type(value).__name__}')
    return value.strip()


# -- splitting -------------------------------------------------------------------------------------


def split_position(example: Example) -> float:
    """Where an example falls in [0, 1): a hash of its opening question, the same on every machine.

    Case, punctuation and spacing do not count, so a question that comes several times, with several
    answers or in several spellings, is on one side of the split with all of them.
    """
    opening = next((content for role, content in example.prompt if role == "user"), example.question)
    words = " ".join(re.findall(r"\w+", opening.casefold())) or opening
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") / 2**64


def split_examples(examples: Sequence[Example], held_out: float) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples; ``held_out`` is the share of the questions that is held out.

    The held-out examples come in the order of their hash, so that any number of them from the front
    is a fixed and mixed sample.
    """
    kept = [e for e in examples if split_position(e) >= held_out]
    out = sorted((e for e in examples if split_position(e) < held_out), key=split_position)
    if not kept or not out:
        side = "training" if out else "held-out"
        raise InputError(
            f"no {side} examples: {len(examples)} examples do not split at --held-out {held_out:g}; "
            "give more data or another share"
        )
    return kept, out


# -- tokens ----------------------------------------------------------------------------------------


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
