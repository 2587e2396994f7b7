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


@pytest.mark.parametrize("folder", ["spiel_peft", "kernels", "spiel_peft_cli", "benchmarks", "examples", "docs"])
def test_sentences_name_their_subject(folder: str) -> None:
    """No page and no docstring says "somebody", "whoever" or "nobody", as a reader has to guess who is meant."""
    files = [path for suffix in ("*.py", "*.md") for path in sorted((ROOT / folder).rglob(suffix))]
    assert files
    vague = re.compile(r"\b(somebody|whoever|nobody)\b", flags=re.IGNORECASE)
    assert not [path.name for path in files if vague.search(path.read_text(encoding="utf-8"))]
