"""What the page on resuming says is true: its code runs and resumes bit for bit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .helpers import Run, assert_same

PAGE = Path(__file__).parents[2] / "docs" / "resuming.md"


def test_the_code_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    save, load = code.split("# In the next process")
    whole, run, again = Run().train(1), Run().train(1, 7), Run()
    exec("import torch\n" + save, {"model": run.model, "optimizer": run.optimizer})
    exec("import torch\n#" + load, {"model": again.model, "optimizer": again.optimizer})
    assert_same(again.train(8).everything(), whole.everything())
