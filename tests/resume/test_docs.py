"""The code on docs/resuming.md runs and resumes bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.docs_blocks import code_blocks, page
from support.runs import assert_same

from .helpers import Run


def test_the_code_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = code_blocks(page("resuming.md"))
    save, load = code.split("# In the next process")
    whole, run, again = Run().train(1), Run().train(1, 7), Run()
    exec("import torch\n" + save, {"model": run.model, "optimizer": run.optimizer})
    exec("import torch\n#" + load, {"model": again.model, "optimizer": again.optimizer})
    assert_same(again.train(8).everything(), whole.everything())
