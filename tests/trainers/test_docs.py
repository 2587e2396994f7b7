"""docs/trainers.md is correct: both sides of every diff run, and differ in the config only."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from peft import PeftModel
from support.adapters import log_of
from support.docs_blocks import code_blocks, page
from support.models import tiny_llama, tiny_t5
from support.text import rows, sentences, texts, tokenizer
from support.trainer_runs import QUIET
from torch import nn
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from trl import DPOConfig, GRPOConfig, RewardConfig, SFTConfig

from .trl_runs import preferences, prompts, share_of_wanted, tiny_scorer

PAGE = page("trainers.md")
# Wide enough for r=16, and the first close is after five steps.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
STEPS = 6


def blocks() -> dict[str, str]:
    """The diff under each heading."""
    parts = re.split(r"^#+ (.*)$", PAGE, flags=re.MULTILINE)[1:]
    found = {}
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        diffs = code_blocks(text, "diff")
        assert len(diffs) <= 1, heading
        if diffs:
            found[heading] = diffs[0]
    return found


BLOCKS = blocks()


def side(diff: str, sign: str) -> str:
    return "\n".join(line[1:] for line in diff.splitlines() if not line or line[0] in (" ", sign))


def arguments(kind: type[Any], **settings: Any) -> Any:
    fields = {"output_dir": "out", "max_steps": STEPS, "per_device_train_batch_size": 4, **QUIET, **settings}
    return kind(**fields, **({} if kind in (TrainingArguments, Seq2SeqTrainingArguments) else {"bf16": False}))


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in torch.tensor(sentences()).split(4)][:STEPS]


def loader(count: int) -> DataLoader[Any]:
    return DataLoader([{"input_ids": ids, "labels": ids} for ids in torch.tensor(sentences())[:count]], batch_size=2)


def lightning_trainer() -> lightning.Trainer:
    switches = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return lightning.Trainer(max_steps=STEPS, accelerator="cpu", **dict.fromkeys(switches, False))


def llama(**names: Any) -> dict[str, Any]:
    return {"model": tiny_llama(**SIZES), **names}


def trl(kind: type[Any], dataset: Callable[[], Any], **settings: Any) -> dict[str, Any]:
    return llama(args=arguments(kind, **settings), dataset=dataset(), tokenizer=tokenizer())


GENERATING = {"num_generations": 4, "max_completion_length": 4}
# What the user has before each block.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "Trainer": lambda: llama(args=arguments(TrainingArguments), dataset=rows()),
    "Seq2SeqTrainer": lambda: {
        "model": tiny_t5(d_model=64, d_kv=32, d_ff=64),
        "args": arguments(Seq2SeqTrainingArguments),
        "dataset": rows(),
    },
    "SFTTrainer": lambda: trl(SFTConfig, texts),
    "DPOTrainer": lambda: trl(DPOConfig, preferences),
    "GRPOTrainer": lambda: {**trl(GRPOConfig, prompts, **GENERATING), "reward": share_of_wanted},
    "RewardTrainer": lambda: {**trl(RewardConfig, preferences), "model": tiny_scorer(**SIZES)},
    "PyTorch": lambda: llama(batches=batches()),
    "Accelerate": lambda: llama(loader=loader(4 * STEPS)),
    "Lightning": lambda: llama(loader=loader(32), trainer=lightning_trainer()),
}
WITH_AN_ADAPTER: dict[str, Callable[[], dict[str, Any]]] = {
    "A second stage on a trained adapter": lambda: trl(DPOConfig, preferences),
    "Using the adapter": llama,
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(heading: str, sign: str, given: dict[str, Any]) -> dict[str, Any]:
    exec(compile(side(BLOCKS[heading], sign), heading, "exec"), given)
    return given


def trained(names: dict[str, Any]) -> nn.Module:
    if "module" in names:
        return names["module"].model
    return names["model"] if isinstance(names["model"], PeftModel) else names["trainer"].model


def test_every_block_is_run_here() -> None:
    assert BLOCKS.keys() == GIVEN.keys() | WITH_AN_ADAPTER.keys()


@pytest.mark.parametrize("heading", BLOCKS)
def test_nothing_but_the_config_is_swapped(heading: str) -> None:
    lines = BLOCKS[heading].splitlines()
    assert {line[:1] for line in lines} <= {"", " ", "-", "+"}
    for line in lines:
        if line.startswith("-"):
            assert "LoraConfig" in line
        if line.startswith("+"):
            assert "SpIELConfig" in line or line in ("+import spiel_peft", "+from peft import get_peft_model")


@pytest.mark.parametrize("heading", GIVEN)
def test_both_sides_run(heading: str) -> None:
    run(heading, "-", GIVEN[heading]())
    model = trained(run(heading, "+", GIVEN[heading]()))
    assert [report.step for report in log_of(model)] == [5]
    assert (Path("adapter") / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("sign", ["-", "+"])
def test_adapters_are_used_as_shown(sign: str) -> None:
    made = trained(run("SFTTrainer", sign, GIVEN["SFTTrainer"]()))
    ids = torch.tensor(sentences(4))
    with torch.no_grad():
        expected = made.eval()(ids).logits
    names = run("Using the adapter", sign, WITH_AN_ADAPTER["Using the adapter"]())
    assert not isinstance(names["model"], PeftModel)
    with torch.no_grad():
        torch.testing.assert_close(names["model"].eval()(ids).logits, expected)
    second = run("A second stage on a trained adapter", sign, WITH_AN_ADAPTER["A second stage on a trained adapter"]())
    assert sorted(second["model"].peft_config) == ["default", "ref"]
    if sign == "+":
        assert [report.step for report in log_of(second["model"])] == [5]


def test_the_readme_links_the_page() -> None:
    readme = page("README.md")
    assert "(docs/trainers.md)" in readme
    assert "(../README.md#from-lora-to-spiel)" in PAGE and "## From LoRA to SpIEL" in readme
