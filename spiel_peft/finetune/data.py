"""The training data of a run: reads and splits files of pairs, chats or texts, and makes TRL's rows of them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
DEMO_PACKAGE = "chatterbot_corpus"

Message = dict[str, str]
# A row of TRL's data: {"text": ...}, or {"prompt": ..., "completion": ...} with two strings or two lists of messages.
Row = dict[str, Any]


class InputError(ValueError):
    """An option or a file of the user's cannot be used. The message is one line that names the option or file."""


@dataclass(frozen=True)
class Example:
    """One answer to learn and the conversation before it, or one plain text to learn.

    Attributes:
        prompt: turns (role, content), the last one not the assistant's; empty for plain text.
        answer: the answer, or the plain text.
    """

    prompt: tuple[tuple[str, str], ...]
    answer: str

    @property
    def question(self) -> str:
        """The turn that the answer replies to, or the plain text."""
        return self.prompt[-1][1] if self.prompt else self.answer

    @property
    def messages(self) -> list[Message]:
        """The prompt in the form that chat templates take."""
        return [{"role": role, "content": content} for role, content in self.prompt]


@dataclass(frozen=True)
class Corpus:
    """The distinct examples of one file or package: all of them answers, or all of them plain texts.

    Attributes:
        source: how errors and reports call the data.
        examples: the distinct examples, at least one.
        blank: number of blank examples that were left out.
        duplicates: number of repeated examples that were left out.
    """

    source: str
    examples: list[Example]
    blank: int
    duplicates: int

    @property
    def kind(self) -> str:
        """How errors call the examples: "question-answer pairs" or "texts"."""
        return _kind(self.examples[0])


def _kind(example: Example) -> str:
    return "question-answer pairs" if example.prompt else "texts"


# -- reading ---------------------------------------------------------------------------------------


def read_corpus(path: Path) -> Corpus:
    """Read the distinct examples of a ``.txt`` file (see `read_texts`) or of a jsonl file (see `read_jsonl`).

    Raises:
        InputError: the file cannot be read, is malformed, or has no usable example.
    """
    return distinct(str(path), read_texts(path) if path.suffix == ".txt" else read_jsonl(path))


def distinct(source: str, examples: Sequence[Example]) -> Corpus:
    """Make a corpus without the blank and repeated examples.

    Raises:
        InputError: no example is left.
    """
    filled = [e for e in examples if e.question.strip() and e.answer.strip()]
    kept = list(dict.fromkeys(filled))
    if not kept:
        raise InputError(f"{source}: no usable question-answer pairs ({len(examples)} read, all of them blank)")
    return Corpus(source, kept, len(examples) - len(filled), len(filled) - len(kept))


def read_texts(path: Path) -> list[Example]:
    """Read a text file: one example for each paragraph. Blank lines divide the paragraphs."""
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
    """The bytes of a file; an InputError with its name if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def read_jsonl(path: Path) -> list[Example]:
    """Read a jsonl file with one object per line: texts, or pairs and chats in any mixture.

    - A text is ``{"text": ...}``.
    - A pair is ``{"question": ..., "answer": ...}`` or ``{"prompt": ..., "completion": ...}``.
    - A chat is ``{"messages": [{"role": ..., "content": ...}, ...]}``; it gives one example per assistant turn.

    Raises:
        InputError: names the file and the line.
    """
    lines = _read(path).splitlines()
    examples: list[Example] = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        for example in _parse_line(line, where):
            if examples and _kind(example) != _kind(examples[0]):
                # Texts are packed into blocks and answers are not. TRL packs a data set as a whole or not at all.
                raise InputError(
                    f"{where}: {_kind(example)} after {_kind(examples[0])}; put them in a file and a run of their own"
                )
            examples.append(example)
    if not examples:
        raise InputError(f"{path}: no question-answer pairs in {len(lines)} lines")
    return examples


def _parse_line(line: bytes, where: str) -> Iterator[Example]:
    """The examples in one line of a jsonl file. Errors call the line `where`."""
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
    if "text" in record:
        yield Example((), _text(record["text"], "text", where))
    elif "messages" in record:
        yield from _parse_messages(record["messages"], where)
    else:
        expected = '"question" and "answer", "prompt" and "completion", "messages", or "text"'
        raise InputError(f"{where}: expected {expected}; found {', '.join(map(repr, record)) or 'nothing'}")


def _parse_messages(messages: Any, where: str) -> Iterator[Example]:
    """One example per assistant turn of a conversation; the turns before it are its prompt."""
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
    """The string `value` without surrounding spaces; an InputError with key and line if it is no string."""
    if not isinstance(value, str):
        raise InputError(f'{where}: "{key}" must be a string, got {type(value).__name__}')
    return value.strip()


# -- splitting -------------------------------------------------------------------------------------


def split_position(example: Example) -> float:
    """A number in [0, 1) that decides on which side of the split an example is: a hash of its first question.

    The hash is the same on every machine. It ignores case, punctuation and spacing, so that all answers to a question
    and all its spellings are on the same side.
    """
    opening = next((content for role, content in example.prompt if role == "user"), example.question)
    words = " ".join(re.findall(r"\w+", opening.casefold())) or opening
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") / 2**64


def split_examples(examples: Sequence[Example], held_out: float) -> tuple[list[Example], list[Example]]:
    """Split examples into training and held-out ones; `held_out` is the share of the questions that is held out.

    The held-out examples are sorted by their hash, so that the first n of them are a fixed random sample.

    Raises:
        InputError: one of the two sides is empty.
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


# -- the demo's pairs ------------------------------------------------------------------------------


def demo_pairs(language: str = "english") -> Corpus:
    """Question-answer pairs from the package chatterbot-corpus (BSD licence): the first two lines of each conversation.

    Later lines are left out: in some files they are other answers to the first line, in others further turns of the
    dialogue, and nothing tells the two apart.

    Raises:
        InputError: the package is not installed, or does not have the language.
    """
    data = folder_of_package(DEMO_PACKAGE, "chatterbot-corpus", "pip install chatterbot-corpus") / "data"
    files = sorted((data / language).glob("*.yml"))
    if not files:
        known = ", ".join(sorted(path.name for path in data.iterdir() if path.is_dir()))
        raise InputError(f"chatterbot-corpus has no language {language!r}; it has {known}")
    import yaml  # comes with chatterbot-corpus; `demo_model` works without it

    examples = []
    for file in files:
        for conversation in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            if len(conversation) >= 2:
                question, answer = (str(line).strip() for line in conversation[:2])
                examples.append(Example((("user", question),), answer))
    return distinct(f"chatterbot-corpus ({language})", examples)


def folder_of_package(package: str, name: str, command: str) -> Path:
    """The folder of an installed package, found without importing it; else an InputError with the install command."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{name} is not installed: {command}")
    return Path(spec.submodule_search_locations[0])


# -- rows ------------------------------------------------------------------------------------------


def as_row(example: Example, tokenizer: Any) -> Row:
    """The example as a row for TRL: a text, or prompt and completion.

    Prompt and completion are lists of messages if the tokenizer has a chat template, else strings.
    """
    if not example.prompt:
        return {"text": example.answer}
    if tokenizer.chat_template:
        return {"prompt": example.messages, "completion": [{"role": "assistant", "content": example.answer}]}
    return {"prompt": plain_prompt(example.messages), "completion": f" {example.answer}"}


def plain_prompt(messages: Sequence[Message]) -> str:
    """The turns of a conversation as lines of text, for models without a chat template."""
    return "".join(f"{m['role'].capitalize()}: {m['content']}\n" for m in messages) + "Assistant:"


def prompt_ids(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """The token ids after which the model generates its answer."""
    if tokenizer.chat_template:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    ids = list(tokenizer(plain_prompt(messages))["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def rows_that_fit(corpus: Sequence[Example], tokenizer: Any, max_length: int, side: str) -> list[Row]:
    """Rows for TRL of all examples but those whose prompt alone has `max_length` tokens or more.

    Args:
        corpus: the examples.
        tokenizer: the model's tokenizer.
        max_length: longest example in tokens.
        side: "training" or "held-out", for errors.

    Raises:
        InputError: no example is left.
    """
    fitting = [e for e in corpus if not e.prompt or len(prompt_ids(e.messages, tokenizer)) < max_length]
    if not fitting:
        raise InputError(f"every {side} prompt is longer than --max-length {max_length}: raise it")
    return [as_row(example, tokenizer) for example in fitting]
