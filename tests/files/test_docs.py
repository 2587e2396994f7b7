"""The code on the pages about extracting and exporting runs, with the results that the pages state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.checkpoints import changed, loaded, saved, trained_adapter
from support.docs_blocks import code_blocks, page
from support.models import IDS, logits, tiny_llama


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_llama(hidden_size=64, intermediate_size=128)
    saved(base, Path("base"))


def test_extracting() -> None:
    saved(changed(loaded(Path("base")), 0.1), Path("finetuned"))
    names = {"base_model": loaded(Path("base")), "batches": [{"input_ids": IDS, "labels": IDS}] * 3}
    for block in code_blocks(page("extracting.md")):
        exec(block, names)
    assert names["found"].kept > 0.05 and names["found"].left_out
    ticket = PeftModel.from_pretrained(loaded(Path("base")), "ticket")
    task = PeftModel.from_pretrained(loaded(Path("base")), "task")
    base = logits(loaded(Path("base")))
    assert torch.equal(logits(ticket), base) and not torch.equal(logits(task), base)


def test_exporting() -> None:
    trained_adapter(Path("base"), Path("adapter"))
    names: dict[str, object] = {}
    for block in code_blocks(page("exporting.md")):
        exec(block, names)
    assert names["report"].dtypes == {"float32"}
    assert not torch.equal(logits(loaded(Path("merged"))), logits(loaded(Path("merged_as_trained"))))
