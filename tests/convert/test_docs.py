"""The code blocks of the page on converting run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from peft import ShiraConfig, get_peft_model
from support.adapters import adapted
from support.docs_blocks import code_blocks, page
from support.models import tiny_llama

from spiel_peft.convert import KINDS, export_sparse_patch, read_sparse_patches

PAGE = page("converting.md")


def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("path/to/base")
    config = ShiraConfig(r=1, target_modules=["q_proj"], init_weights=False)
    get_peft_model(tiny_llama(), config).save_pretrained("their_adapter")
    blocks = code_blocks(PAGE)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, {})
    for name in ("my_adapter", "shira_adapter", "patch", "diff"):
        assert (tmp_path / name).is_dir()
    assert capsys.readouterr().out.count("torch.int32 torch.float32") == 2


def test_the_table_lists_every_kind() -> None:
    assert re.findall(r"^\| .* \| `([\w-]+)` \|", PAGE, flags=re.MULTILINE) == ["kind", *KINDS]


def test_the_fields_of_a_patch_are_those_the_page_says(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "adapter")
    export_sparse_patch(tmp_path / "adapter", tmp_path / "patch", tiny_llama())
    assert all(
        list(vars(p)) == ["name", "indices", "values", "full_shape"] for p in read_sparse_patches(tmp_path / "patch")
    )
