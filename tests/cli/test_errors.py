"""An error is one line or one JSON object with the right exit code, and leaves nothing half-written."""

from __future__ import annotations

import io
import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from support.adapters import edit_adapter, key_of
from support.checkpoints import contents

from spiel_peft_cli.main import main
from spiel_peft_cli.output import Output

from .helpers import Shell

Q = "model.layers.0.self_attn.q_proj"
# Every command on the adapter "task", in the folders of the tests.
USES = {
    "info": ["info", "task"],
    "plot": ["plot", "task", "--out", "new"],
    "merge": ["merge", "task", "--base", "base", "--out", "new"],
    "combine": ["combine", "task", "--out", "new"],
    "convert": ["convert", "task", "--to", "shira", "--base", "base", "--out", "new"],
}


@contextmanager
def no_room(nbytes: int) -> Iterator[None]:
    """Let writes beyond this file size fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("arguments", USES.values(), ids=USES)
def test_a_damaged_tensor_is_named(arguments: list[str], shell: Shell, folders: Path) -> None:
    module = "model.layers.1.mlp.up_proj"
    edit_adapter(folders / "task", lambda t: t[key_of(module, "values")][3:4].fill_(float("nan")))
    before = contents(folders)
    message = shell.fails(*arguments, code=3)
    assert "task/adapter_model.safetensors" in message and f"{module}.spiel_delta.values" in message
    assert contents(folders) == before


@pytest.mark.parametrize("arguments", USES.values(), ids=USES)
def test_missing_and_truncated_files_are_named(arguments: list[str], shell: Shell, folders: Path) -> None:
    file = folders / "task" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "task/adapter_model.safetensors cannot be read" in shell.fails(*arguments, code=3)
    file.unlink()
    assert "task/adapter_model.safetensors is missing" in shell.fails(*arguments, code=3)
    (folders / "task" / "adapter_config.json").unlink()
    assert "task/adapter_config.json is missing" in shell.fails(*arguments, code=3)
    error = json.loads(shell(*arguments, "--json", code=3))["error"]
    assert error["exit_code"] == 3 and error["type"] == "FileNotFoundError" and shell.err == ""


def test_a_damaged_base_is_named(shell: Shell, folders: Path) -> None:
    file = folders / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    for arguments in (
        USES["merge"],
        ["extract", "--base", "base", "--finetuned", "finetuned", "--r", "1", "-o", "new"],
    ):
        assert "base/model.safetensors" in shell.fails(*arguments, code=3)
    assert not Path("new").exists()


@pytest.mark.parametrize("name", ["plot", "merge", "combine", "convert"])
def test_a_full_disk_leaves_nothing(name: str, shell: Shell, folders: Path) -> None:
    before = contents(folders)
    with no_room(5_000):
        main(USES[name])
        err = shell.capsys.readouterr().err
        code = main([*USES[name], "--json"])
    assert code == 4
    assert err.splitlines()[-1].startswith("error: ") and "File too large" in err and "new" in err
    assert json.loads(shell.capsys.readouterr().out)["error"]["exit_code"] == 4
    assert contents(folders) == before and not Path("new").exists()


@pytest.mark.parametrize("room", [9_000, 48_500], ids=["the adapter", "the optimizer's state"])
def test_a_full_disk_in_training(room: int, shell: Shell, folders: Path) -> None:
    before = contents(folders)
    train = ["train", "--model", "base", "--data", "train.jsonl", "--output-dir", "new", "--growth", "none"]
    with no_room(room):
        message = json.loads(shell(*train, "--r", "2", "--max-steps", "2", "--save-every", "1", "--json", code=4))
    assert "new" in message["error"]["message"]
    assert contents(folders) == before and not Path("new").exists()


def test_wrong_usage_as_json(shell: Shell) -> None:
    error = shell.json("merge", "task", "--base", "base", code=2)["error"]
    assert error["type"] == "UsageError" and "--out" in error["message"]
    assert shell.json("info", "task", "--nonsense", code=2)["error"]["exit_code"] == 2
    assert "No such command" in shell.fails("meld", code=2)
    assert "spiel-peft merge --help" in shell.fails("merge", "task", "--base", "base", code=2)


def test_faults_of_ours_are_one_line_too(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    import spiel_peft.inspection.facts as facts

    def broken(*_: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(facts, "adapter_facts", broken)
    assert "KeyError: 'oops'. This is a fault of spiel-peft" in shell.fails("info", "task", code=70)
    assert shell("info", "task", "--debug", code=70) == ""
    assert "Traceback" in shell.err and 'raise KeyError("oops")' in shell.err
    assert shell.json("info", "task", code=70)["error"]["type"] == "KeyError"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ImportError("bitsandbytes is missing"), 5, "bitsandbytes is missing"),
        (PermissionError(13, "Permission denied", "out"), 4, "out: Permission denied"),
        (ValueError("two\nlines"), 3, "two lines"),
    ],
)
def test_codes(error: Exception, code: int, message: str, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    import spiel_peft.inspection.facts as facts

    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(facts, "adapter_facts", broken)
    assert message in shell.fails("info", "task", code=code)


def test_interrupting(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    import spiel_peft.inspection.facts as facts

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(facts, "adapter_facts", interrupted)
    assert shell("info", "task", code=130) == "" and shell.err.strip() == "error: interrupted"
    assert shell.json("info", "task", code=130)["error"]["message"] == "interrupted"


def test_names_that_look_like_markup_are_printed_as_they_are(shell: Shell, folders: Path) -> None:
    (folders / "task").rename(folders / "[bold]task")
    assert "[bold]task" in shell("info", "[bold]task")
    assert "[bold]no" in shell.fails("info", "[bold]no", code=3)


# -- progress and warnings -------------------------------------------------------------------------


def test_long_work_shows_its_progress(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["merge", "language", "--base", "base", "--out"]
    shell(*arguments, "a")
    assert "Merging" in shell.err and "100%" in shell.err and "Merging" not in shell.out
    shell.json(*arguments, "b")
    assert shell.err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    shell.json(*arguments, "c")
    assert "Merging" in shell.err


def test_what_libraries_warn_of_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import logging
    import warnings

    output = Output(as_json=True)
    with output.in_charge():
        warnings.warn("first\nline", stacklevel=1)
        warnings.warn("for developers", FutureWarning, stacklevel=1)
        logging.getLogger("spiel_peft.somewhere").warning("second %s", "line")
        logging.getLogger("spiel_peft.somewhere").warning("second %s", "line")
    output.result({"share": float("nan"), "names": {"b", "a"}}, lambda _: None)
    out, err = capsys.readouterr()
    assert err == "warning: first line\nwarning: second line\n"
    assert json.loads(out) == {"share": None, "names": ["a", "b"], "warnings": ["first line", "second line"]}


def test_tables_are_not_cut_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert Output().stdout.width == 160
    assert isinstance(Output().stdout, Console)
