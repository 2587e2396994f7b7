"""examples/sft.py, sft_4bit.py and dpo.py: they train on a tiny model, and PEFT loads what they save."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from cli.helpers import COLOURS, THINGS, tokenizer
from peft import PeftModel
from support.models import tiny_llama
from transformers import AutoModelForCausalLM

import dpo
import sft
import sft_4bit
from spiel_peft.files.adapter_file import read_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model, pairs and preferences."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": f"what colour is the {thing} {second} ?", "completion": f" it is {colour} ."}
        for thing, colour in zip(THINGS, COLOURS * 2, strict=False)
        for second in THINGS
    ]
    worse = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " what what what"} for r in rows]
    for name, lines in (("pairs", rows), ("preferences", worse)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def arguments(folder: Path, data: str, steps: int) -> list[str]:
    paths = ["--model", str(folder / "model"), "--data", str(folder / data), "--output-dir", str(folder / "adapter")]
    return [*paths, "--max-steps", str(steps), "--learning-rate", "1e-2"]


def numbers(capsys: pytest.CaptureFixture[str]) -> list[float]:
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("held-out loss")]
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line)]


def assert_loads(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.tensor([[3, 4, 5, 6, 20, 8]])
    before = base(ids).logits
    assert not torch.equal(PeftModel.from_pretrained(base, folder / "adapter")(ids).logits, before)


def test_sft(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft.main(arguments(folder, "pairs.jsonl", 20))
    before, after = numbers(capsys)
    assert after < before - 1
    assert_loads(folder)


def test_sft_in_4_bits(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    sft_4bit.main(arguments(folder, "pairs.jsonl", 6))
    assert_loads(folder)
    deltas = read_adapter(folder / "adapter").deltas.values()
    assert all(delta.values.dtype == torch.float32 for delta in deltas)


def test_dpo(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dpo.main(arguments(folder, "preferences.jsonl", 12))
    loss, margin = numbers(capsys)
    assert loss < 0.5 and margin > 0.5
    assert_loads(folder)


def test_each_script_can_be_read_at_once() -> None:
    """A longer one should hand something to the package."""
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    short = {"sft.py", "sft_4bit.py", "dpo.py", "demo.py"}
    assert lines.keys() == short | {"zero_shot.py", "distill.py", "sense_lm.py"}
    assert {name for name, count in lines.items() if count >= (80 if name in short else 150)} == set()
