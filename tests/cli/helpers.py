"""Folders for the commands to work on, and a way to run a command in this process."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from peft import ShiraConfig, get_peft_model
from support.adapters import adapted, train
from support.checkpoints import changed, loaded, saved
from support.models import tiny_llama
from support.text import tokenizer as word_tokenizer
from transformers import PreTrainedTokenizerFast

from spiel_peft_cli.main import main

COLOURS = ["red", "green", "blue", "black", "white", "grey"]
THINGS = ["sky", "sea", "rose", "grass", "snow", "coal", "bear", "stone"]
WORDS = ["what", "colour", "is", "the", "it", "?", ".", "User", "Assistant", ":", *COLOURS, *THINGS]


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for the questions of `pairs`, with fewer than 40 words."""
    return word_tokenizer(["<pad>", "<unk>", "<end>", *WORDS], eos="<end>", split_punctuation=True, max_length=64)


def make_folders(where: Path) -> None:
    """Make all files and folders that the examples of the commands name."""
    base = saved(tiny_llama(hidden_size=64, intermediate_size=128), where / "base")
    tokenizer().save_pretrained(base)
    model = adapted(loaded(base), init_weights=True, accumulation_steps=2, regrow_every=3, growth="random")
    train(model, 6)
    model.save_pretrained(where / "adapter")
    for name, seed, targets in (
        ("other_adapter", 2, ["q_proj"]),
        ("language", 3, ["q_proj", "down_proj"]),
        ("task", 4, ["down_proj", "up_proj"]),
    ):
        config = {"target_modules": targets, "density": 0.2}
        adapted(loaded(base), seed=seed, **config).save_pretrained(where / name)
    saved(changed(loaded(base), 0.1), where / "finetuned")
    shira = ShiraConfig(r=1, target_modules=["q_proj"], init_weights=False)
    get_peft_model(loaded(base), shira).save_pretrained(where / "their_adapter")
    (where / "train.jsonl").write_text(pairs(), encoding="utf-8")


def pairs() -> str:
    """Questions that a tiny model can learn, as jsonl."""
    rows = [
        {"question": f"what colour is the {a} {b} ?", "answer": f"it is {COLOURS[number % len(COLOURS)]} ."}
        for number, a in enumerate(THINGS)
        for b in THINGS
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


class Shell:
    """Runs commands and keeps their output."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: object, code: int = 0) -> str:
        """Run a command that must end with this exit code; returns its stdout."""
        self.capsys.readouterr()
        found = main([str(argument) for argument in arguments])
        self.out, self.err = self.capsys.readouterr()
        assert found == code, self.out + self.err
        return self.out

    def json(self, *arguments: object, code: int = 0) -> Any:
        """Run a command with --json; returns the object it prints, which must be all of stdout."""
        return json.loads(self(*arguments, "--json", code=code))

    def fails(self, *arguments: object, code: int) -> str:
        """Run a command that must fail with this code and an empty stdout; returns its one line on stderr."""
        out = self(*arguments, code=code)
        assert out == "" and self.err.startswith("error: ") and self.err.count("\n") == 1, self.out + self.err
        assert "Traceback" not in self.err
        return self.err


def plain(text: str) -> str:
    """Help as one line: without frames and line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())
