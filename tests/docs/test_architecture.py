"""docs/architecture.md agrees with the code."""

from __future__ import annotations

import re

import pytest
from support.docs_blocks import ROOT, code_blocks, page
from test_import_direction import FLOORS

PAGE = page("architecture.md")


def test_every_file_it_names_exists() -> None:
    named = set(re.findall(r"`((?:spiel_peft|spiel_peft_cli|kernels|benchmarks|tests)/[\w/]+\.py)`", PAGE))
    assert len(named) > 30
    assert not [name for name in sorted(named) if not (ROOT / name).is_file()]
    for link in re.findall(r"\]\(\.\./([^)]+)\)", PAGE):
        assert (ROOT / link).exists(), link


def test_every_module_of_the_root_and_every_package_is_on_the_map() -> None:
    parts = {path.stem for path in (ROOT / "spiel_peft").glob("*.py")} | {
        path.parent.name for path in (ROOT / "spiel_peft").glob("*/__init__.py")
    }
    assert not [part for part in sorted(parts - {"__init__"}) if not re.search(rf"\b{part}\b", PAGE)]


def test_the_direction_is_the_one_that_is_tested() -> None:
    (block,) = [block for block in code_blocks(PAGE, language="") if block.startswith("spiel_kernels\n")]
    lines = [set(re.findall(r"\w+", line)) for line in block.splitlines()]
    floors = [set(floor.split()) - {"__init__", "autoload"} for floor in FLOORS]
    assert lines[1:-1] == [floor for floor in floors if floor]


VAGUE = re.compile("some[b]ody|who[e]ver|no[b]ody", flags=re.IGNORECASE)  # brackets, as this file is searched too


@pytest.mark.parametrize(
    "folder", [".", "spiel_peft", "kernels", "spiel_peft_cli", "benchmarks", "examples", "docs", "tests"]
)
def test_sentences_name_their_subject(folder: str) -> None:
    """A reader must not have to guess who is meant: no page, docstring or name of a test says one of these words."""
    inside = (ROOT / folder).glob if folder == "." else (ROOT / folder).rglob
    files = [path for suffix in ("*.py", "*.md") for path in sorted(inside(suffix))]
    assert files
    assert not [path.name for path in files if VAGUE.search(path.read_text(encoding="utf-8"))]
