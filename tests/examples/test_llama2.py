"""docs/paper-setting.md and examples/llama2: what they say runs, on a tiny Llama in place of LLaMA-2."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.helpers import pairs, tokenizer
from peft import PeftModel
from support.checkpoints import loaded, saved
from support.docs_blocks import ROOT, code_blocks, page
from support.models import tiny_llama

from spiel_peft.files.adapter_file import read_adapter
from spiel_peft_cli.main import main

PAGE = page("paper-setting.md")
COMMANDS = [shlex.split(line) for block in code_blocks(PAGE, "bash") for line in block.splitlines()]
TRAIN = [line for line in COMMANDS if line[:2] == ["spiel-peft", "train"]]
MERGE = [line for line in COMMANDS if line[:2] == ["spiel-peft", "merge"]]
# A step of 8 examples instead of 128, and lengths for 64 short pairs.
SMALL = shlex.split(
    "--r 4 --batch-size 2 --grad-accum 4 --max-length 64 --regrow-every 4 --accumulation-steps 2 --lr 1e-2"
)
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: flan_v2.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "User: {{question}}\\nAssistant:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<end>"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with everything that the commands read."""
    for name in ("llama-2-7b", "llama-2-13b"):
        tokenizer().save_pretrained(saved(tiny_llama(hidden_size=64, intermediate_size=128), tmp_path / name))
    (tmp_path / "flan_v2.jsonl").write_text(pairs())
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_setting_has_a_command() -> None:
    options = [" ".join(line) for line in TRAIN]
    assert len(options) == len(set(options)) == 6 and len(MERGE) == 2
    assert len(COMMANDS) == len(TRAIN) + len(MERGE) + 1  # of several GPUs: tests/distributed/test_train_command.py
    for path in {part for line in COMMANDS for part in line if part.startswith("examples/")}:
        assert (ROOT / path).is_file(), path


def test_the_commands_run_one_after_the_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    for command in (TRAIN[0], TRAIN[2], TRAIN[-1]):
        assert main([*command[1:], *SMALL]) == 0, capsys.readouterr().err
    deltas = {path.name: read_adapter(path / "adapter") for path in (folder / "runs").iterdir()}
    assert len(deltas) == 3 and all(len(adapter.deltas) == 14 for adapter in deltas.values())
    arguments = {
        name: torch.load(next((folder / "runs" / name).glob("checkpoint-*")) / "training_args.bin", weights_only=False)
        for name in ("7b-ag", "13b-ma")
    }
    assert {name: (a.weight_decay, a.warmup_steps, a.max_grad_norm) for name, a in arguments.items()} == {
        "7b-ag": (30.0, 0.03, 0.0),
        "13b-ma": (0.0, 0.03, 0.0),
    }
    for command in MERGE:
        assert main(command[1:]) == 0, capsys.readouterr().err
    ids = torch.tensor([[3, 4, 5, 6, 20, 8]])
    model = PeftModel.from_pretrained(loaded(folder / "llama-2-7b").to(torch.bfloat16), "runs/7b-ag/adapter")
    merged = loaded(folder / "runs/7b-ag/merged").to(torch.bfloat16)  # as it was saved
    # Merging rounds the sum of the float32 base and the deltas, training that of the rounded base and the deltas.
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=0.1, rtol=0.05)


def test_an_adapter_and_its_merged_model_have_the_same_score(folder: Path) -> None:
    pytest.importorskip("lm_eval")
    (command,) = [line for line in TRAIN if line[-1] == "runs/7b-ag"]
    assert main([*command[1:], *SMALL, "--merge", "--epochs", "6"]) == 0
    (folder / "colours.yaml").write_text(TASK)
    scores = []
    for model in ("pretrained=llama-2-7b,peft=runs/7b-ag/adapter", "pretrained=runs/7b-ag/merged"):
        program = "import spiel_peft, runpy; runpy.run_module('lm_eval', run_name='__main__')"
        options = [
            "--model",
            "hf",
            "--model_args",
            f"{model},dtype=float32",
            "--tasks",
            "colours",
            "--include_path",
            ".",
        ]
        options += ["--device", "cpu", "--batch_size", "8", "--output_path", f"out{len(scores)}.json"]
        done = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (written,) = folder.glob(f"out{len(scores)}_*.json")
        scores.append(json.loads(written.read_text())["results"]["colours"]["exact_match,none"])
    assert scores[0] == scores[1] > 0


def test_the_data_are_written_as_the_command_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    from spiel_peft.finetune.data import read_corpus

    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found: dict[str, list[dict[str, Any]]] = {
        "ostapeno/tulu_v2_flan_v2_subset": [{"dataset": "flan_v2", "messages": chat}],
        "allenai/tulu-v2-sft-mixture": [{"dataset": "lima", "id": "1", "messages": [*chat, *chat]}],
        "vicgalle/alpaca-gpt4": [
            {"instruction": "add", "input": text, "output": "3", "text": "whole"} for text in ("", "1 and 2")
        ],
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: Dataset.from_list(found[name]))
    (code,) = code_blocks(PAGE)
    exec(code, {})
    alpaca = read_corpus(tmp_path / "gpt4_alpaca.jsonl").examples
    assert [(e.question, e.answer) for e in alpaca] == [("add", "3"), ("add\n\n1 and 2", "3")]
    assert len(read_corpus(tmp_path / "flan_v2.jsonl").examples) == 1
    assert len(read_corpus(tmp_path / "tulu_v2.jsonl").examples) == 2
