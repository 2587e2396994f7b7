"""Question-answer data for the examples: chatterbot-corpus by default, and what `spiel-peft train` reads too."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from spiel_peft.finetune.data import (
    IGNORED_LABEL,
    AnswerCollator,
    Corpus,
    Example,
    InputError,
    Message,
    Tokens,
    answer_tokens,
    distinct,
    encode,
    encode_all,
    encode_prompt,
    read_jsonl,
    render,
    split_examples,
    split_position,
)

__all__ = [
    "IGNORED_LABEL",
    "AnswerCollator",
    "Corpus",
    "Example",
    "InputError",
    "Message",
    "Tokens",
    "answer_tokens",
    "encode",
    "encode_all",
    "encode_prompt",
    "load_corpus",
    "read_chatterbot",
    "read_jsonl",
    "render",
    "split_examples",
    "split_position",
]


def load_corpus(path: Path | None) -> Corpus:
    """The examples of a jsonl file, or of the PyPI package chatterbot-corpus when no file is given."""
    if path is None:
        source, examples = "chatterbot-corpus (English, BSD licence)", read_chatterbot()
    else:
        source, examples = str(path), read_jsonl(path)
    return distinct(source, examples)


def read_chatterbot(language: str = "english") -> list[Example]:
    """One language of chatterbot-corpus: the first line of each conversation and the reply to it.

    What follows the first reply is an alternative answer in some files and the next turn of a
    dialogue in others, without a mark that tells which, so it is not used.
    """
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("no --data given and chatterbot-corpus is not installed: pip install chatterbot-corpus")
    data = Path(spec.submodule_search_locations[0], "data")
    folder = data / language
    if not any(folder.glob("*.yml")):
        known = ", ".join(sorted(path.name for path in data.iterdir() if path.is_dir()))
        raise InputError(f"chatterbot-corpus has no language {language!r}; it has {known}")
    import yaml  # a dependency of this data source only

    examples = []
    for file in sorted(folder.glob("*.yml")):
        for conversation in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            if len(conversation) >= 2:
                question, answer = (str(line).strip() for line in conversation[:2])
                examples.append(Example((("user", question),), answer))
    return examples
