"""examples/zero_shot.py from end to end on a tiny model, in its three ways of training the task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.text import tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import zero_shot
from spiel_peft.finetune.data import InputError

WORDS = {
    "source": ["what", "is", "next", "to"],
    "one": ["was", "ist", "neben", "an"],
    "two": ["que", "esta", "junto", "a"],
}
NUMBERS = [f"n{i}" for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a word-level tokenizer, and pairs in three made-up languages."""
    folder = tmp_path_factory.mktemp("zero_shot")
    vocabulary = ["<pad>", "<unk>", "<end>", "User", "Assistant", ":", *sum(WORDS.values(), []), *NUMBERS]
    made = tokenizer(vocabulary, eos="<end>", split_punctuation=True, max_length=None)
    made.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for language, words in WORDS.items():
        lines = [
            json.dumps({"question": " ".join([*words, NUMBERS[i]]), "answer": f"{NUMBERS[(i + 1) % 30]} {words[1]}"})
            for i in range(30)
        ]
        (folder / f"{language}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    given = ["--model", str(folder / "model"), "--data-dir", str(folder), "--output-dir", str(out)]
    return [*given, "--source", "source", "--languages", "one", "two", *more]


@pytest.mark.parametrize("way", ["separate", "on-top", "ready"])
def test_each_way_trains_measures_and_saves_the_sums(way: str, folder: Path, tmp_path: Path) -> None:
    steps = ["--language-steps", "6", "--task-steps", "8", "--learning-rate", "2e-2", "--r", "4"]
    results = zero_shot.main(arguments(folder, tmp_path, "--task-training", way, *steps))
    assert set(results) == {"one", "two"} and results == json.loads((tmp_path / "results.json").read_text())
    for losses in results.values():
        assert losses["both"] < losses["base"] and losses["task"] < losses["base"]
    adapters = {path.name for path in tmp_path.iterdir() if (path / "adapter_config.json").is_file()}
    trained = {"one", "two", "task"} | ({"source"} if way == "on-top" else set())
    assert adapters == trained | {"one_task", "two_task"}
    # One file holds the sum, for any PEFT script.
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = PeftModel.from_pretrained(base, tmp_path / "one_task")
    run = zero_shot.Run(zero_shot.parse_args(arguments(folder, tmp_path)))
    run.model = model
    rows = run.rows(run.pairs["one"][1])
    assert run.trainer(rows, 1).evaluate(rows)["eval_loss"] == pytest.approx(results["one"]["both"], rel=1e-4)


def test_wrong_input_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="klingon.jsonl: No such file"):
        zero_shot.main([*arguments(folder, tmp_path)[:-1], "klingon"])
    with pytest.raises(SystemExit):
        zero_shot.main(["--languages", "english", "italian"])
    assert "--languages must be distinct, and other than --source" in capsys.readouterr().err
