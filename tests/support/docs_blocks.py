"""Code blocks of the pages in docs/ and of the README, for tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def page(name: str) -> str:
    """The text of a page: a name in docs/, or "README.md"."""
    folder = ROOT if name == "README.md" else ROOT / "docs"
    return (folder / name).read_text(encoding="utf-8")


def code_blocks(text: str, language: str = "python") -> list[str]:
    """The contents of all blocks of a Markdown text that are marked as this language."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
