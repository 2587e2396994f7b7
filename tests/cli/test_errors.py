"""An error is one line or one JSON object with the right exit code, and leaves nothing half-written."""

from __future__ import annotations

import io
import json
import os
import resource
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
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


# -- names of others, exit codes, options ----------------------------------------------------------

# Clears the screen, sets the title, turns the text round, ends the line, and deletes a character; C1's CSI.
NASTY = "\x1b[2Jq\x1b]0;t\x07\u202e\rerror: \x9b1m\x7f\u2028[red]"


def assert_harmless(*printed: str) -> None:
    text = "".join(printed)
    assert not [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    # As we escape it, or as Python's repr does in messages that quote the name.
    assert "\\u001b[2Jq" in text or "\\x1b[2Jq" in text


def rename_module(folder: Path, name: str) -> None:
    """Give one module of an adapter another name, in its tensors and in its config."""
    file, old = folder / "adapter_model.safetensors", "model.layers.0.mlp.down_proj"
    tensors = {key.replace(old, name): tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def test_names_cannot_steer_the_terminal(shell: Shell, folders: Path) -> None:
    rename_module(folders / "language", NASTY)
    for arguments, code in (
        (["info", "language", "task"], 0),
        (["validate", "language"], 1),
        (["merge", "language", "--base", "base", "--out", "new"], 3),
        (["plot", "language", "--out", "new", "--module", "x"], 3),
        (["info", "language", "--base", "base", "--debug"], 3),
    ):
        for json_flag in ([], ["--json"]):
            out = shell(*arguments, *json_flag, code=code)
            assert_harmless(out, shell.err)
            if json_flag and code == 0:
                # A program that reads the JSON gets the name as it is.
                assert json.dumps(NASTY) in json.dumps(json.loads(out))


def test_values_and_file_names_cannot_steer_the_terminal(shell: Shell, folders: Path) -> None:
    edit_json(folders / "task" / "adapter_config.json", base_model_name_or_path=NASTY)
    assert_harmless(shell("info", "task"), shell.err)
    named = NASTY.replace("/", "")
    (folders / "task").rename(folders / named)
    assert_harmless(shell("info", named), shell.err)
    assert_harmless(shell("validate", named), shell.err)
    assert_harmless(shell.fails("info", named + "?", code=3))
    assert "\x1b" not in shell.fails("plot", "language", "--out", "new", "--kind", NASTY, code=2)
    assert_harmless(shell("combine", named, "--out", "new" + NASTY), shell.err)
    undecodable = os.fsdecode(b"\xff\xfe" + NASTY.encode())
    assert_harmless(shell.fails("info", undecodable, code=3))


def test_progress_shows_names_as_they_are(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    output = Output()
    with pytest.raises(ZeroDivisionError), output.progress("Working") as report:
        assert report is not None
        report(1, 2, "[/nothing] \x1b]0;t\x07")
        raise ZeroDivisionError  # the last name stays on the screen
    err = shell.capsys.readouterr().err
    assert "[/nothing] \\u001b]0;t\\u0007" in err and "\x1b]0" not in err


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


EXTRACT = ["extract", "--base", "base", "--finetuned", "finetuned", "--out", "new"]
COMBINE = ["combine", "language", "task", "--out", "new"]
# What the error says, and which name of an argument or field it must not say.
OPTIONS = {
    "density": ([*EXTRACT, "--density", "2"], 3, "--density must be", "`density`"),
    "num deltas": ([*EXTRACT, "--num-deltas", "1"], 3, "--num-deltas 1 does not fit", "num_deltas"),
    "targets": ([*EXTRACT, "--r", "1", "--target-module", "("], 3, "--target-module: '('", "target_modules"),
    "type": ([*COMBINE, "--type", "svd"], 3, "--type svd is about", "combination_type"),
    "rule": ([*COMBINE, "--density", "0.5"], 3, "pass another --type.", "combination_type"),
    "all zero": (
        [*COMBINE, "--weight", "0", "--weight", "0", "--drop-zeros"],
        3,
        "leave out --drop-zeros",
        "drop_zeros",
    ),
    "weights": ([*COMBINE, "--weight", "nan", "--weight", "1"], 3, "--weight must be", "weights"),
    "base": (["merge", "task", "--base", "no", "--out", "new"], 3, "--base: no is not a folder", "base_dir"),
    "no base": (["convert", "their_adapter", "--out", "new"], 3, "pass --base", "base="),
    "format": (["convert", "their_adapter", "--from", "x", "--out", "new"], 3, "--from must be", "kind"),
    "r": (["convert", "task", "--to", "shira", "--r", "1", "--base", "base", "--out", "new"], 3, "--r 1 is too", "r=1"),
    "window": (
        ["train", "--model", "base", "--data", "train.jsonl", "--output-dir", "new", "--regrow-every", "2"],
        3,
        "--accumulation-steps must be at most --regrow-every",
        "accumulation_steps",
    ),
    "seed": (["train", "--model", "base", "--data", "train.jsonl", "-o", "new", "--seed", 2**32], 2, "--seed", "seed "),
    "steps": (
        ["train", "--model", "base", "--data", "train.jsonl", "-o", "new", "--max-steps", 2**63],
        2,
        "--max-st",
        "_",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_errors_name_the_option(name: str, shell: Shell, folders: Path) -> None:
    arguments, code, said, unsaid = OPTIONS[name]
    before = contents(folders)
    shell(*arguments, code=code)
    message = shell.err.splitlines()[-1]
    assert message.startswith("error: ") and said in message and unsaid not in message.replace(said, "")
    assert contents(folders) == before


def test_fields_in_files_are_named_as_they_are(shell: Shell, folders: Path) -> None:
    edit_json(folders / "task" / "adapter_config.json", density=5.0)
    for command in (COMBINE, USES["merge"]):
        message = shell.fails(*command, code=3)
        assert "task/adapter_config.json" in message and "`density` must be" in message


FILES = {
    "config too deep": ("base/config.json", "[" * 100_000, USES["merge"]),
    "config of a wrong type": ("base/config.json", '{"model_type": "llama", "hidden_size": "x"}', USES["merge"]),
    "log too deep": ("log.json", "[" * 100_000, [*USES["plot"], "--kind", "loss", "--log", "log.json"]),
    "infinite step": (
        "log.json",
        '{"log_history": [{"spiel/churn": 0.1, "step": 1e400}]}',
        [*USES["plot"], "--kind", "churn", "--log", "log.json"],
    ),
    "infinite step of a loss": (
        "log.json",
        json.dumps({"log_history": [{"loss": 1, "step": 2}]}).replace("2", "1e400"),
        [*USES["plot"], "--kind", "loss", "--log", "log.json"],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_no_fault_of_ours(name: str, shell: Shell, folders: Path) -> None:
    file, text, arguments = FILES[name]
    (folders / file).write_text(text)
    assert "fault of spiel-peft" not in shell.fails(*arguments, code=3)


def test_a_closed_pipe_is_no_bad_input() -> None:
    from spiel_peft_cli.main import _code

    assert _code(BrokenPipeError(32, "Broken pipe")) == 4
