"""PEFT's own benchmark: the experiments, and what puts them into a harness and runs them there.

The harness is no part of this checkout. The tests write stand-ins, with its files and the format of its results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks_under_test import peft_metamathqa
from peft import LoraConfig, PeftConfig, get_peft_model
from support.models import tiny_llama

from spiel_peft import SpIELConfig

harness = peft_metamathqa.harness
NAMES = harness.names()
NAME = "llama-3.2-3B-rank32-lr_3e-4"

# Writes a result as the harness does.
WRITE = """
import datetime, json, pathlib, sys
def write(count, folder="results", end="", status="success"):
    *_, method, name = pathlib.Path(sys.argv[-1]).parts
    rate = json.loads(pathlib.Path(sys.argv[-1], "training_params.json").read_text())["optimizer_kwargs"]["lr"]
    last = {"test accuracy": 0.5, "forgetting": 0.04, "train loss": 0.6}
    result = {
        "run_info": {
            "created_at": datetime.datetime.now().isoformat(),
            "experiment_name": f"{method}/{name}",
            "train_config": {"optimizer_kwargs": {"lr": rate}},
        },
        "train_info": {
            "num_trainable_params": count,
            "train_time": 90.0,
            "accelerator_memory_max": 2**31,
            "file_size": 2**20,
            "status": status,
            "metrics": [last],
        },
        "meta_info": {"system_info": {"accelerator": "a GPU"}},
    }
    pathlib.Path(folder, f"{method}--{name}{end}.json").write_text(json.dumps(result))
"""
# The first line fails unless something has imported this package and the stand-in for PEFT before.
RUN = """
import sys; imported = [sys.modules["spiel_peft"].NUMBER, sys.modules["spiel_peft"].peft.NUMBER]
from utils import write
assert imported == [1, 2] and sys.argv[1] == "-v" and __name__ == "__main__"
"""


def stand_in(folder: Path, run: str, steps: int = 5000) -> Path:
    """A checkout with a harness. Its packages spiel_peft and peft are empty, so that processes start quickly."""
    home = folder / "checkout" / "method_comparison" / "MetaMathQA"
    for name in ("results", "temporary_results"):
        (home / name).mkdir(parents=True)
    (home / "run.py").write_text(run)
    (home / "utils.py").write_text(WRITE)
    (home / "data.py").write_text("")
    settings = {"max_steps": steps, "generation_kwargs": {"max_length": 800, "max_new_tokens": 300}}
    (home / "default_training_params.json").write_text(json.dumps(settings))
    for name, content in (("spiel_peft", "NUMBER = 1\nimport peft"), ("peft", "NUMBER = 2")):
        (folder / "checkout" / "src" / name).mkdir(parents=True)
        (folder / "checkout" / "src" / name / "__init__.py").write_text(content)
    return home


def command_line(home: Path, *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    peft_metamathqa.add_arguments(parser)
    return parser.parse_args(["--harness", str(home), *argv])


def content(name: str, file: str) -> dict[str, Any]:
    return json.loads((harness.EXPERIMENTS / name / file).read_text())


@pytest.fixture(autouse=True)
def any_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_metamathqa, "OLDEST_PYTHON", (3, 10))


# The experiments


def test_each_budget_is_tried_at_three_rates() -> None:
    found = {
        (content(name, "adapter_config.json")["r"], content(name, "training_params.json")["optimizer_kwargs"]["lr"])
        for name in NAMES
    }
    assert found == {(r, rate) for r in (10, 32) for rate in (1.5e-4, 3e-4, 6e-4)} and len(NAMES) == 6


@pytest.mark.parametrize("name", NAMES)
def test_files_say_what_differs_from_the_defaults(name: str) -> None:
    config = content(name, "adapter_config.json")
    assert config.pop("peft_type") == "SPIEL" and config.pop("task_type") == "CAUSAL_LM"
    defaults = SpIELConfig().to_dict()
    assert not [field for field, value in config.items() if value == defaults[field]]
    assert config["total_steps"] == 5000
    training = content(name, "training_params.json")
    assert training.keys() == {"optimizer_kwargs"} and training["optimizer_kwargs"].keys() == {"lr", "weight_decay"}
    assert training["optimizer_kwargs"]["weight_decay"] == 0.1
    assert float(name.rpartition("_")[2]) == training["optimizer_kwargs"]["lr"]
    assert f"rank{config['r']}-" in name and ("mlp" in name) == ("target_modules" in config)


@pytest.mark.parametrize("name", NAMES)
def test_as_many_values_are_trained_as_by_lora(name: str) -> None:
    config = PeftConfig.from_pretrained(str(harness.EXPERIMENTS / name))
    assert isinstance(config, SpIELConfig)
    lora = LoraConfig(r=config.r, target_modules=config.target_modules, task_type="CAUSAL_LM")
    counts, adapted = [], []
    for each in (config, lora):
        base = tiny_llama(hidden_size=160, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
        model = get_peft_model(base, each)
        counts.append(model.get_nb_trainable_parameters()[0])
        adapted.append(set(model.targeted_module_names))
    assert counts[0] == counts[1] and adapted[0] == adapted[1]
    kinds = {"gate_proj", "up_proj", "down_proj"} if "mlp" in name else {"q_proj", "v_proj"}
    assert {module.rpartition(".")[2] for module in adapted[0]} == kinds


# The launcher


def test_a_run_imports_this_package_first_and_is_in_the_table(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # stays behind the checkout's PEFT
    home = stand_in(tmp_path, RUN + "write(9175040)")
    peft_metamathqa.run(command_line(home, NAME))
    placed = home / "experiments" / "spiel" / NAME
    assert [path.name for path in sorted(placed.iterdir())] == ["adapter_config.json", "training_params.json"]
    line = f"| spiel/{NAME} | 0.0003 | 9,175,040 | 0.500 | 0.040 | 0.600 | 1.5 | 2.0 | 1.0 | a GPU |"
    assert line in capfd.readouterr().out

    # LoRA's results come with the harness; results of PEFT's branches other than main have a time in their names.
    result = json.loads((home / "results" / f"spiel--{NAME}.json").read_text())
    result["run_info"]["experiment_name"] = "lora/llama-3.2-3B-rank32"
    (home / "results" / "lora--llama-3.2-3B-rank32.json").write_text(json.dumps(result))
    (home / "run.py").write_text(RUN + "write(7, 'temporary_results', '--2026-01-01T00-00-00')")
    peft_metamathqa.run(command_line(home, NAME))
    printed = capfd.readouterr().out
    assert f"{NAME} has a result" in printed and "9,175,040" in printed and "| lora/llama-3.2-3B-rank32 |" in printed
    peft_metamathqa.run(command_line(home, NAME, "--again"))
    assert "| 7 |" in capfd.readouterr().out


@pytest.mark.parametrize("ending", ["raise RuntimeError('no GPU')", "write(1, 'temporary_results', '--1', 'canceled')"])
def test_runs_without_a_result_are_named_and_the_others_go_on(
    tmp_path: Path, ending: str, capfd: pytest.CaptureFixture[str]
) -> None:
    home = stand_in(tmp_path, RUN + f"if '1.5e-4' in sys.argv[-1]: {ending}\nelse: write(1)")
    names = [name for name in NAMES if "rank32" in name]
    with pytest.raises(SystemExit, match=rf"^no result of {names[0]}; the output above says why$"):
        peft_metamathqa.run(command_line(home, *names))
    printed = capfd.readouterr().out
    assert printed.count("| spiel/") == 2 and printed.count(" begins\n") == 3


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    home = stand_in(tmp_path, RUN)
    there = home / "experiments" / "spiel" / NAMES[-1] / "training_params.json"
    there.parent.mkdir(parents=True)
    there.write_text("{}")
    with pytest.raises(SystemExit, match="training_params.json must not have other content than .*: move it away"):
        peft_metamathqa.run(command_line(home))
    assert there.read_text() == "{}" and len(list(there.parents[1].rglob("*.json"))) == 1


def test_errors_say_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="must be the folder method_comparison/MetaMathQA .* which has no run.py, "):
        peft_metamathqa.run(command_line(tmp_path))
    home = stand_in(tmp_path, RUN, steps=4000)
    with pytest.raises(SystemExit, match="total_steps must be 4000, as max_steps in .*: change .*adapter_config.json"):
        peft_metamathqa.run(command_line(home))
    with pytest.raises(SystemExit, match=f"NAME must be one of {NAMES[0]}, .*, got r32"):
        peft_metamathqa.run(command_line(home, "r32"))
    home = stand_in(tmp_path / "old", RUN)
    monkeypatch.setattr(peft_metamathqa, "OLDEST_PYTHON", (4, 0))
    with pytest.raises(SystemExit, match="the harness needs Python"):
        peft_metamathqa.run(command_line(home))


# The rehearsal

# Everything that the harness asks of machine, model and data, in short.
REHEARSED = """
import json, sys, tempfile, torch
from datasets import load_dataset
from peft import PeftConfig, get_peft_model
from peft.utils import infer_device
from transformers import AutoModelForCausalLM, AutoTokenizer
from utils import write

device = infer_device()
assert device in ["cuda", "xpu"]
backend = getattr(torch, device)
backend.reset_peak_memory_stats(), backend.manual_seed_all(0), backend.empty_cache()
assert backend.max_memory_reserved() == backend.memory_allocated() == backend.memory_reserved() == 0
assert backend.get_device_name(0) == "CPU"

settings = json.load(open("default_training_params.json"))
tokenizer = AutoTokenizer.from_pretrained(settings["model_id"])
tokenizer.pad_token = tokenizer.eos_token
base = AutoModelForCausalLM.from_pretrained(
    pretrained_model_name_or_path=settings["model_id"], device_map=device, dtype=torch.bfloat16
)
texts = [row["text"] for row in load_dataset("HuggingFaceFW/finewiki", split="train", streaming=True).take(8)]
batch = tokenizer(texts, return_tensors="pt")
with torch.inference_mode():
    assert 1 < base(**batch, labels=batch["input_ids"]).loss < 2
tests = load_dataset("openai/gsm8k", "main")
assert {name: len(rows) for name, rows in tests.items()} == {"train": 50, "test": 10}
assert all("#### " in row["answer"] and row["question"] for rows in tests.values() for row in rows)
rows = load_dataset("meta-math/MetaMathQA")["train"]
assert set(rows.column_names) == {"type", "query", "response", "original_question"}

model = get_peft_model(base, PeftConfig.from_pretrained(sys.argv[-1]))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
assert len(rows) >= 4 * settings["max_steps"]
for step in range(settings["max_steps"]):
    part = rows[4 * step : 4 * step + 4]
    batch = tokenizer([a + b for a, b in zip(part["query"], part["response"])], padding=True, return_tensors="pt")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
with tempfile.TemporaryDirectory(ignore_cleanup_errors=True, delete=False) as folder:
    model.save_pretrained(folder)
write(model.get_nb_trainable_parameters()[0])
"""


@pytest.mark.slow
def test_a_rehearsal_needs_neither_gpu_nor_network(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    home = stand_in(tmp_path, REHEARSED)
    for path in home.parents[1].glob("src/*/__init__.py"):
        path.unlink()  # the packages of the environment are taken
    before = sorted(home.rglob("*"))
    peft_metamathqa.run(command_line(home, NAME, "--rehearse"))
    assert f"| spiel/{NAME} | 0.0003 | 35,840 |" in capfd.readouterr().out
    assert sorted(home.rglob("*")) == before


def test_a_rehearsal_without_an_adapter_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 adapters must have been saved after 30 steps and 2 closes, got .* \[\]"):
        peft_metamathqa.rehearsal.check_adapters(harness.Harness(tmp_path), 1)
