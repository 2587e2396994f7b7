"""examples/demo.py: its two commands on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli.helpers import Shell, pairs, tokenizer
from support.checkpoints import loaded, saved
from support.models import tiny_llama

import demo
from spiel_peft.finetune.base_model import ModelSource
from spiel_peft.finetune.data import Corpus, demo_pairs, read_corpus, split_examples


def test_it_trains_asks_merges_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    tokenizer().save_pretrained(base)
    (tmp_path / "pairs.jsonl").write_text(pairs(), encoding="utf-8")
    corpus: Corpus = read_corpus(tmp_path / "pairs.jsonl")
    shell, out, said = Shell(capsys), tmp_path / "out", []
    monkeypatch.setattr(demo, "demo_model", lambda: ModelSource(str(base)))
    monkeypatch.setattr(demo, "demo_pairs", lambda: corpus)
    monkeypatch.setattr(demo, "spiel_peft", lambda command: said.append(shell(*command)) or 0)
    for _ in range(2):  # a second run replaces the first
        assert demo.main(["--max-steps", "12", "--r", "2", "--lr", "1e-2"], out) == 0
    train, plot = said[-2:]
    assert "before, " in train and "after, on" in train
    for question in demo.QUESTIONS:
        assert f"question  {question}" in train
    assert {path.stem for path in (out / "plots").iterdir()} == {"churn", "density", "histogram", "loss", "matrix"}
    assert (out / "adapter" / "adapter_model.safetensors").is_file() and "loss.png" in plot
    loaded(out / "merged")
    monkeypatch.setattr(demo, "spiel_peft", lambda command: 3)
    assert demo.main([], out) == 3


def test_its_questions_are_held_out() -> None:
    pytest.importorskip("chatterbot_corpus")
    train, held_out = split_examples(demo_pairs().examples, 0.1)
    assert set(demo.QUESTIONS) <= {example.question for example in held_out}
    assert not set(demo.QUESTIONS) & {example.question for example in train}
