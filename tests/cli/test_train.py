"""`spiel-peft train` learns, resumes exactly, and refuses bad input before it writes."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.checkpoints import contents, loaded, tensors_of
from transformers import AutoTokenizer

from spiel_peft.files.adapter_file import read_adapter
from spiel_peft.finetune import run
from spiel_peft.inspection import read_closes, validate_adapter

from .helpers import COLOURS, Shell

RUN = ["train", "--model", "base", "--data", "train.jsonl"]
SHORT = ["--r", "2", "--lr", "1e-2", "--regrow-every", "4", "--accumulation-steps", "2", "--warmup-steps", "2"]


def test_a_run_learns_and_saves_what_it_says(shell: Shell, folders: Path) -> None:
    data = shell.json(*RUN, *SHORT, "--output-dir", "run", "--max-steps", "20", "--held-out", "0.2")
    assert data["steps"] == 20 and data["resumed_from"] is None
    assert data["eval_loss"] < data["eval_loss_before"] - 1
    adapter = read_adapter(data["adapter"])
    assert data["deltas"] == sum(delta.k for delta in adapter.deltas.values())
    assert data["closes"] == len(read_closes("run/adapter")) == 5
    assert validate_adapter("run/adapter", "base") == []
    model = PeftModel.from_pretrained(loaded(folders / "base"), "run/adapter")
    assert len(adapter.deltas) == 14
    ids = AutoTokenizer.from_pretrained("run/adapter")("what colour is the sky ?", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    assert "train_loss" in data and (folders / "run" / "trainer_state.json").is_file()


def test_resuming_equals_not_having_stopped(shell: Shell, folders: Path) -> None:
    run = [*RUN, *SHORT, "--max-steps", "12", "--save-every", "5", "--output-dir"]
    shell(*run, "whole")
    shell(*run, "cut")
    before = tensors_of(folders / "whole" / "adapter")
    # As if the run was stopped after step 10: the later checkpoint and the result are missing.
    for name in ("checkpoint-12", "adapter"):
        shutil.rmtree(folders / "cut" / name)
    data = shell.json(*run, "cut", "--resume")
    assert data["resumed_from"] == "cut/checkpoint-10" and data["steps"] == 12
    after = tensors_of(folders / "cut" / "adapter")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert read_closes("cut") == read_closes("whole")


def test_resuming_a_complete_run_saves_its_result(shell: Shell, folders: Path) -> None:
    run = [*RUN, *SHORT, "--max-steps", "6", "--output-dir", "run"]
    first = shell.json(*run)
    before = tensors_of(folders / "run" / "adapter")
    shutil.rmtree(folders / "run" / "adapter")
    second = shell.json(*run, "--resume")
    assert second["steps"] == 6 and second["train_loss"] is None
    assert second["eval_loss"] == pytest.approx(first["eval_loss"])
    after = tensors_of(folders / "run" / "adapter")
    assert all(
        torch.equal(before[key], after[key]) for key in before if not key.rpartition(".")[2].startswith("spiel_")
    )
    assert "complete already" in shell(*run, "--resume")
    # With more steps the run goes on.
    run[run.index("6")] = "9"
    assert shell.json(*run, "--resume")["steps"] == 9
    epochs = [*RUN, *SHORT, "--epochs", "0.5", "--held-out", "0", "--output-dir", "epochs"]
    assert shell.json(*epochs)["steps"] == 8
    assert shell.json(*epochs, "--resume")["steps"] == 8


def test_a_folder_with_a_run_is_kept(shell: Shell, folders: Path) -> None:
    run = [*RUN, *SHORT, "--max-steps", "4", "--output-dir", "run"]
    assert "has no checkpoint" in shell.fails(*run, "--resume", code=3)
    assert not Path("run").exists()
    shell(*run)
    before = contents(folders)
    message = shell.fails(*run, code=4)
    assert "--resume" in message and "--overwrite" in message
    assert contents(folders) == before
    (folders / "run" / "mine.txt").write_text("kept")
    shell(*run, "--overwrite", "--seed", "3", "--save-every", "0")
    adapter = "run/adapter/adapter_model.safetensors"
    assert contents(folders)[adapter] != before[adapter]
    # The checkpoints of the earlier run are gone.
    assert sorted(path.name for path in (folders / "run").iterdir()) == ["adapter", "mine.txt", "trainer_state.json"]


@pytest.mark.parametrize(
    "options",
    [
        ["--load-in-4bit", "--density", "0.1"],
        ["--bf16", "--gradient-checkpointing", "--grad-accum", "2"],
        ["--growth", "momentum", "--num-deltas", "500", "--target-module", "q_proj", "--target-module", "up_proj"],
        ["--held-out", "0", "--save-every", "0", "--growth", "random"],
        ["--eval-data", "train.jsonl", "--eval-every", "2"],
    ],
    ids=["4bit", "bf16", "momentum", "no evaluation", "evaluation file"],
)
def test_other_ways_to_run(options: list[str], shell: Shell) -> None:
    if "--load-in-4bit" in options:
        pytest.importorskip("bitsandbytes")
    data = shell.json(*RUN, "--output-dir", "run", "--max-steps", "3", "--accumulation-steps", "2", *options)
    assert data["steps"] == 3 and Path("run/adapter/adapter_model.safetensors").is_file()
    assert (data["eval_loss"] is None) == ("0" in options)
    if "--num-deltas" in options:
        assert data["deltas"] == 500 and {m.rpartition(".")[2] for m in read_adapter("run/adapter").deltas} == {
            "q_proj",
            "up_proj",
        }
    if "--eval-every" in options:
        history = json.loads(Path("run/trainer_state.json").read_text())["log_history"]
        assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 2, 3]
    if "--save-every" in options:
        assert not list(Path("run").glob("checkpoint-*"))


def test_plain_texts(shell: Shell, folders: Path) -> None:
    text = "\n\n".join(f"the sky is {colour} .\nthe sea is {colour} ." for colour in COLOURS)
    (folders / "texts.txt").write_text(text)
    lines = "".join(json.dumps({"text": part}) + "\n" for part in text.split("\n\n"))
    (folders / "texts.jsonl").write_text(lines)
    results = []
    for name in ("texts.txt", "texts.jsonl"):
        run = ["train", "--model", "base", "--data", name, *SHORT, "--max-steps", "3", "--held-out", "0.4"]
        results.append(shell.json(*run, "--output-dir", f"of-{name}"))
    assert results[0]["train_loss"] == results[1]["train_loss"]
    assert results[0]["examples"] + results[0]["held_out"] == len(COLOURS)


def test_long_texts_are_split_and_learnt_as_a_whole(shell: Shell, folders: Path) -> None:
    (folders / "long.txt").write_text(" ".join(["the sky is blue ."] * 5))  # 25 words and an end: 10, 10 and 6
    run = ["train", "--model", "base", "--data", "long.txt", "--max-length", "10", "--batch-size", "1"]
    data = shell.json(*run, *SHORT, "--held-out", "0", "--output-dir", "run")
    assert (data["examples"], data["steps"]) == (1, 3)
    log = json.loads(Path("run/trainer_state.json").read_text())["log_history"]
    assert [entry["num_tokens"] for entry in log if "num_tokens" in entry][-1] == 26


def test_texts_and_answers_do_not_go_together(shell: Shell, folders: Path) -> None:
    (folders / "mixed.jsonl").write_text('{"question": "a ?", "answer": "b"}\n\n{"text": "c"}\n')
    (folders / "texts.txt").write_text("the sky is blue .")
    run = [*RUN, "--output-dir", "run"]
    assert "mixed.jsonl:3: texts after question-answer pairs" in shell.fails(*run, "--data", "mixed.jsonl", code=3)
    message = shell.fails(*run, "--eval-data", "texts.txt", code=3)
    assert "--eval-data texts.txt holds texts" in message and "give a file of question-answer pairs" in message


def test_further_arguments_of_trl(shell: Shell, folders: Path) -> None:
    (folders / "more.yaml").write_text("weight_decay: 1e-1\nlr_scheduler_type: constant\n")
    shell(*RUN, *SHORT, "--max-steps", "4", "--output-dir", "run", "--config", "more.yaml")
    log = json.loads(Path("run/trainer_state.json").read_text())["log_history"]
    assert [entry["learning_rate"] for entry in log if "learning_rate" in entry] == [0.01] * 4
    arguments = torch.load("run/checkpoint-4/training_args.bin", weights_only=False)
    assert arguments.weight_decay == 0.1


def test_options_in_a_file(shell: Shell, folders: Path) -> None:
    options = {
        "model": "base",
        "data": "train.jsonl",
        "output_dir": "run",
        "r": 2,
        "max_steps": 9,
        "learning_rate": "1e-2",
    }
    options |= {"warmup_steps": 0.5, "held_out": 0, "target_module": "q_proj", "bf16": False, "accumulation_steps": 2}
    (folders / "run.yaml").write_text(
        "".join(f"{name}: {value}\n" for name, value in options.items()) + "adam_beta2: 0.9"
    )
    assert shell.json("train", "--config", "run.yaml")["steps"] == 9
    log = json.loads(Path("run/trainer_state.json").read_text())["log_history"]
    # Half of the run is warm-up: the rate rises until the sixth step.
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert rates[5] == max(rates) == 0.01
    assert {name.rpartition(".")[2] for name in read_adapter("run/adapter").deltas} == {"q_proj"}
    assert torch.load("run/checkpoint-9/training_args.bin", weights_only=False).adam_beta2 == 0.9
    # The command line wins.
    again = ["--max-steps", "2", "--target-module", "up_proj", "--overwrite"]
    assert shell.json("train", "--config", "run.yaml", *again)["steps"] == 2
    assert {name.rpartition(".")[2] for name in read_adapter("run/adapter").deltas} == {"up_proj"}
    (folders / "run.yaml").write_text("r: many")
    assert "--r" in shell.fails(*RUN, "-o", "bad", "--config", "run.yaml", code=2)
    (folders / "run.yaml").write_text("json: true")
    assert "no field 'json'" in shell.fails(*RUN, "-o", "bad", "--config", "run.yaml", code=3)


def test_sm3_by_name(shell: Shell, folders: Path) -> None:
    (folders / "more.yaml").write_text("optim: sm3\nweight_decay: 0.1\n")
    shell(*RUN, *SHORT, "--growth", "momentum", "--max-steps", "4", "--output-dir", "run", "--config", "more.yaml")
    state = torch.load("run/checkpoint-4/optimizer.pt", weights_only=False)
    assert state["state"] == {} and [group["weight_decay"] for group in state["param_groups"]] == [0.1, 0.0]
    assert "momentum" in state["param_groups"][0] and "betas" not in state["param_groups"][0]


BAD_CONFIGS = {
    "an option's": ("num_train_epochs: 2", "num_train_epochs is set by --epochs; remove it from the file"),
    "unknown": ("wieght_decay: 0.1", "no field 'wieght_decay'; did you mean weight_decay?"),
    "no number": ("weight_decay: much", "weight_decay must be a number, got 'much'"),
    "a list": ("- weight_decay", "expected lines of 'field: value', got list"),
    "no YAML": ("a: b: c", "not YAML"),
    "refused by TRL": ("optim: best", "best"),
}


@pytest.mark.parametrize(("text", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_wrong_config_names_the_field(text: str, message: str, shell: Shell, folders: Path) -> None:
    (folders / "more.yaml").write_text(text)
    before = contents(folders)
    said = shell.fails(*RUN, "--output-dir", "run", "--config", "more.yaml", code=3)
    assert "--config more.yaml" in said and message in said
    assert contents(folders) == before


def test_questions_are_answered_with_and_without_the_adapter(shell: Shell, folders: Path) -> None:
    run = [*RUN, "--r", "8", "--lr", "1e-2", "--max-steps", "40", "--batch-size", "8", "--output-dir", "run", "--merge"]
    question = "what colour is the sky sky ?"
    data = shell.json(*run, "--accumulation-steps", "2", "--ask", question, "--ask", "what is it ?")
    (first, second) = data["answers"]
    assert first["question"] == question and second["question"] == "what is it ?"
    assert first["after"].startswith("it is ") and not first["before"].startswith("it is ")
    # The merged checkpoint has the outputs of the model with the adapter, bit for bit.
    ids = torch.tensor([[3, 4, 5, 6, 20, 8]])
    merged = loaded(folders / "run" / "merged")
    model = PeftModel.from_pretrained(loaded(folders / "base"), "run/adapter")
    assert data["merged"] == "run/merged" and torch.equal(merged(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained("run/merged").eos_token == "<end>"
    text = shell(*run, "--overwrite", "--max-steps", "2", "--ask", question)
    assert f"question  {question}" in text and "before    " in text and "run/merged" in text
    message = shell.fails(*run, "--overwrite", "--load-in-4bit", code=3)
    assert "--merge with --load-in-4bit" in message
    # The merged checkpoint of an earlier adapter is removed.
    shell(*(part for part in run if part != "--merge"), "--overwrite", "--max-steps", "2")
    assert (folders / "run" / "adapter").is_dir() and not (folders / "run" / "merged").exists()


def test_without_trl_the_extra_is_named(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import spiel_peft.finetune

    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "spiel_peft.finetune.run", raising=False)
    monkeypatch.delattr(spiel_peft.finetune, "run", raising=False)
    assert "pip install 'spiel-peft[train]'" in shell.fails(*RUN, "--output-dir", "run", code=5)


BAD = {
    "no model": (["--model", "./nowhere"], 3, "--model ./nowhere: no such file or folder"),
    "no data": (["--data", "nowhere.jsonl"], 3, "nowhere.jsonl: No such file"),
    "bad line": (["--data", "bad.jsonl"], 3, "bad.jsonl:2: not a JSON object"),
    "empty text": (["--data", "empty.txt"], 3, "empty.txt: holds no text"),
    "no such modules": (["--target-module", "no_such_proj"], 3, "no_such_proj"),
    "density": (["--density", "1.5"], 3, "--density must be"),
    "growth": (["--growth", "sideways"], 3, "sideways"),
    "window": (["--regrow-every", "3", "--accumulation-steps", "4"], 3, "--accumulation-steps must be at most"),
    "two budgets": (["--r", "2", "--density", "0.1"], 2, "exactly one of --r"),
    "two lengths": (["--max-steps", "2", "--epochs", "1"], 2, "--max-steps or --epochs"),
    "rate": (["--lr", "-1"], 2, "--learning-rate must be a number above 0"),
    "resume and overwrite": (["--resume", "--overwrite"], 2, "give one of them"),
    "output is a file": (["--output-dir", "train.jsonl"], 3, "it is a file"),
    "data is a folder": (["--data", "base"], 3, "base: Is a directory"),
    "no pairs": (["--data", "empty.jsonl"], 3, "empty.jsonl: no question-answer pairs"),
    "model is a text file": (["--model", "bad.jsonl"], 3, "not a .gguf"),
    "folder without model": (["--model", "."], 3, "has no config.json"),
    "unknown hub id": (["--model", "no-such-owner/no-such-model"], 3, "no-such-owner/no-such-model"),
    "prompts too long": (["--max-length", "3"], 3, "every training prompt is longer than --max-length 3: raise it"),
    "no config": (["--config", "nowhere.yaml"], 3, "--config nowhere.yaml: No such file"),
    "output under a file": (["--output-dir", "train.jsonl/x"], 3, "train.jsonl/x"),
    "4bit of a GGUF file": (["--model", "m.gguf", "--load-in-4bit"], 3, "--load-in-4bit cannot quantize a GGUF file"),
    "missing option": (["--batch-size", "none"], 2, "--batch-size"),
}


ONLY_THE_MODEL_TELLS = ("no such modules", "output under a file")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_changes_nothing(name: str, shell: Shell, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, code, message = BAD[name]
    if name not in ONLY_THE_MODEL_TELLS:
        monkeypatch.setattr(run, "load_base", lambda *a, **k: pytest.fail("the model was loaded"))
    (folders / "bad.jsonl").write_text('{"text": "a"}\n{\n')
    (folders / "empty.txt").write_text("\n\n")
    (folders / "empty.jsonl").touch()
    if "m.gguf" in arguments:
        (folders / "m.gguf").touch()
    before = contents(folders)
    assert message in shell.fails(*RUN, "--output-dir", "run", *arguments, code=code)
    assert contents(folders) == before


def test_the_option_file_can_be_a_pipe(shell: Shell) -> None:
    os.mkfifo("options")
    writer = threading.Thread(target=Path("options").write_text, args=("no_such_field: 1\n",), daemon=True)
    writer.start()
    message = shell.fails(*RUN, "--output-dir", "run", "--config", "options", code=3)
    assert "--config options: SFTConfig of TRL has no field 'no_such_field'" in message
