"""The help appears without importing heavy packages, and its examples run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from spiel_peft_cli.commands import app
from spiel_peft_cli.main import main

from .helpers import Shell, plain

ROOT = Path(__file__).parents[2]
NAMES = ["info", "plot", "validate", "merge", "extract", "combine", "convert", "train"]
EPILOGS = {c.name: c.epilog.removeprefix("Example: ") for c in app.registered_commands}
HEAVY = ("torch", "transformers", "peft", "numpy", "matplotlib", "spiel_peft", "spiel_kernels", "safetensors")


def without_heavy_modules(code: str) -> str:
    """Run code in a new Python; stdout. Fails if it has imported any of the heavy packages."""
    check = f"import sys; found = set(sys.modules) & {set(HEAVY)!r}; assert not found, found"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_help_and_usage_errors_import_nothing_heavy() -> None:
    out = without_heavy_modules(
        "from spiel_peft_cli.main import main\n"
        "assert main(['--help']) == 0 and main([]) == 2 and main(['nonsense']) == 2\n"
        + "".join(f"assert main([{name!r}, '--help']) == 0\n" for name in NAMES)
        + "assert main(['merge', 'adapter']) == 2 and main(['--version']) == 0\n"
    )
    assert "spiel-peft" in out


def test_every_command_is_listed(shell: Shell) -> None:
    shown = plain(shell("--help"))
    assert sorted(NAMES) == sorted(EPILOGS)
    for name in NAMES:
        assert re.search(rf"\b{name} +[A-Z]", shown), name


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_in_the_help_and_run(name: str, shell: Shell, folders: Path) -> None:
    assert f"Example: {EPILOGS[name]}" in plain(shell(name, "--help"))
    command, *arguments = shlex.split(EPILOGS[name])
    assert command == "spiel-peft" and arguments[0] == name
    before = set(folders.rglob("*"))
    assert shell(*arguments).strip()
    assert (set(folders.rglob("*")) > before) == (name not in ("info", "validate"))


def test_every_option_is_explained() -> None:
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        assert command.help
        for parameter in command.params:
            named = parameter.name == "seed"
            assert named or getattr(parameter, "help", None), f"{command.name}: {parameter.name}"


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "validate" in capsys.readouterr().out


def test_the_console_script_exits_with_the_code() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'spiel-peft = "spiel_peft_cli.main:run"' in text
    out = without_heavy_modules(
        "import sys\n"
        "from spiel_peft_cli.main import run\n"
        "sys.argv[1:] = ['info', '--json']\n"
        "try:\n    run()\n"
        "except SystemExit as stopped:\n    assert stopped.code == 2\n"
    )
    assert json.loads(out)["error"]["exit_code"] == 2
