"""The code of docs/composing.md runs, one block after the other, and its table is complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import adapted, deltas_of
from support.docs_blocks import code_blocks, page
from support.models import tiny_llama
from support.text import rows
from support.trainer_runs import QUIET
from transformers import Trainer, TrainingArguments

from spiel_peft.compose.rules import COMBINATION_TYPES

PAGE = page("composing.md")


class Names(dict[str, Any]):
    """The names that the page assumes; `base` is a new model every time."""

    def __missing__(self, name: str) -> Any:
        if name == "base":
            return tiny_llama()
        raise KeyError(name)


def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, language in enumerate(["italian", "spanish", "english", "task"]):
        adapted(adapter=language, seed=seed).save_pretrained(tmp_path / "adapters")
    batches = [
        {"input_ids": ids, "labels": ids} for ids in torch.tensor([row["input_ids"] for row in rows()[:4]]).split(2)
    ]
    args = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, **QUIET)
    names = Names(Trainer=Trainer, args=args, rows=rows(), batches=batches)
    active = []
    for block in code_blocks(PAGE):
        if "optimizer" in block:
            names["optimizer"] = torch.optim.SGD([p for p in names["model"].parameters() if p.requires_grad], lr=0.1)
        exec(block, names)
        active.append(names["model"].active_adapters)
    assert active[0] == active[1] == ["italian", "task"] and active[2] == ["task", "italian"]
    assert active[3][0] == "task" and active[4] == ["mix"]
    assert deltas_of(names["model"], "italian_task").keys() == deltas_of(names["model"], "task").keys()
    folders = {path.parent.name for path in tmp_path.glob("adapters/*/adapter_config.json")}
    assert {"italian_task", "mix", "sum"} <= folders


def test_its_table_has_every_combination_type() -> None:
    assert tuple(re.findall(r'^\| `"(\w+)"`', PAGE, flags=re.MULTILINE)) == COMBINATION_TYPES
    assert len(COMBINATION_TYPES) == 5
