"""The commands on the page about the command line run, and its tables are complete."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from support.docs_blocks import code_blocks, page

from spiel_peft_cli import commands

from .helpers import Shell
from .test_help import NAMES

PAGE = page("command-line.md")


def test_the_commands_run(shell: Shell) -> None:
    lines = [line for block in code_blocks(PAGE, "bash") for line in block.splitlines()]
    assert {line.split()[1] for line in lines} == set(NAMES)
    for line in lines:
        command, _, target = line.partition(" > ")
        out = shell(*shlex.split(command)[1:])
        if target:
            assert json.loads(out)
    assert "churn.png" in {path.name for path in Path("plots").iterdir()}


def test_the_tables_are_complete() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert sorted(listed) == sorted(NAMES)
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, flags=re.MULTILINE)}
    assert codes == {value for name, value in vars(commands).items() if name.isupper() and isinstance(value, int)}
