"""Output folders: inputs are no outputs, there is always an old or a new folder, and leftovers are cleared."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from spiel_peft import (
    export_dense_diff,
    export_shira,
    export_sparse_patch,
    extract_delta,
    merge_adapter_into_checkpoint,
)
from spiel_peft.files import folder as module
from spiel_peft.files.folder import refuse_existing, refuse_inputs, whole_folder, work_folder

# Writes half of a folder and is killed then.
KILLED = """
import os, signal, sys
from pathlib import Path
from spiel_peft.files import folder
target, at = Path(sys.argv[1]), sys.argv[2]
if at == "between the renames":
    folder._exchange = lambda one, other: False
    rename = Path.rename
    def renamed(self, to):
        if self.name == "new":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, to)
    Path.rename = renamed
with folder.whole_folder(target, overwrite=True) as work:
    (work / "file").write_text("half")
    if at == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def kill(target: Path, at: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), at], check=False, timeout=120)
    assert done.returncode == -9


def make(path: Path, text: str = "text") -> Path:
    path.mkdir(parents=True)
    (path / "file").write_text(text)
    return path


def link(path: Path, to: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)
    return path


OVERLAPS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "the input": ("would replace", lambda at: at / "models" / "base"),
    "above": ("would replace", lambda at: at / "models"),
    "far above": ("would replace", lambda at: at),
    "inside": ("is inside", lambda at: at / "models" / "base" / "merged"),
    "far inside": ("is inside", lambda at: at / "models" / "base" / "a" / "b"),
    "dots": ("would replace", lambda at: at / "models" / "x" / ".." / "base"),
    "a link to it": ("would replace", lambda at: link(at / "link", at / "models" / "base")),
    "through a link above": ("would replace", lambda at: link(at / "other", at / "models") / "base"),
    "in a link to it": ("is inside", lambda at: link(at / "link", at / "models" / "base") / "new"),
    "where its files are": ("would replace", lambda at: at / "blobs"),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_an_output_that_is_an_input_is_refused(name: str, tmp_path: Path) -> None:
    message, output = OVERLAPS[name]
    base = make(tmp_path / "models" / "base")
    make(tmp_path / "blobs")
    link(base / "model.safetensors", tmp_path / "blobs" / "file")
    with pytest.raises(ValueError, match=f"--out: .*{message} --base"):
        refuse_inputs(output(tmp_path), {"--base": base}, "--out")


def test_relative_paths_files_and_links_as_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make(tmp_path / "base")
    monkeypatch.chdir(base)
    for output, given in (("../base", "."), (".", base), ("..", "file"), ("x/../../base", [tmp_path, "file"])):
        with pytest.raises(ValueError, match="out_dir"):
            refuse_inputs(output, {"base": given})
    with pytest.raises(ValueError, match="--data file"):
        refuse_inputs(tmp_path, {"--data": "file"})
    with pytest.raises(ValueError, match="base"):
        refuse_inputs(base, {"base": link(tmp_path / "link", base)})


def test_other_outputs_and_inputs_in_memory_are_fine(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    inputs = {"--base": base, "--model": "owner/name", "state": {"a": 1}, "--log": None, "--data": tmp_path / "no"}
    for output in ("base-merged", "bas", "out/base", "base2/file"):
        refuse_inputs(tmp_path / output, inputs)


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two steps"])
def test_overwriting_and_its_failure(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(module, "_exchange", lambda one, other: False)
    target = make(tmp_path / "target", "old")
    with pytest.raises(KeyboardInterrupt), whole_folder(target, overwrite=True) as work:
        (work / "file").write_text("half")
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "old"
    with whole_folder(target, overwrite=True) as work:
        (work / "file").write_text("new")
        assert (target / "file").read_text() == "old"
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_swap_that_fails_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make(tmp_path / "target", "old")
    rename = Path.rename

    def fails(self: Path, to: Path) -> Path:
        if self.name == "new":
            raise OSError("disk gone")
        return rename(self, to)

    monkeypatch.setattr(module, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="disk gone"), whole_folder(target, overwrite=True):
        pass
    assert (target / "file").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.skipif(sys.platform != "linux", reason="the system call is Linux's")
def test_the_old_folder_is_there_until_the_new_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make(tmp_path / "target", "old")
    if not module._exchange(make(tmp_path / "a"), make(tmp_path / "b")):
        pytest.skip("this file system cannot exchange folders")
    # Neither the old nor the new folder is renamed by itself, so that at no moment there is none.
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("renamed"))
    with whole_folder(target, overwrite=True) as work:
        (work / "file").write_text("new")
    assert (target / "file").read_text() == "new"


@pytest.mark.parametrize("at", ["writing", "between the renames"])
def test_what_a_killed_run_left_is_named_and_cleared(at: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = make(tmp_path / "target", "old")
    kill(target, at)
    (left,) = tmp_path.glob(".target.spiel-peft-*")
    assert target.exists() == (at == "writing")
    with caplog.at_level(logging.WARNING), pytest.raises(FileExistsError):
        refuse_existing(target, overwrite=False)
    assert str(left) in caplog.text and ("target was put back" in caplog.text) == (at != "writing")
    assert (target / "file").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["target"]


def test_only_what_is_surely_ours_is_cleared(tmp_path: Path) -> None:
    others = [
        make(tmp_path / ".target.spiel-peft-mine"),
        make(tmp_path / ".target.spiel-peft-odd"),
        make(tmp_path / ".target.abc"),
        make(tmp_path / "target-2"),
    ]
    (others[1] / "spiel-peft-unfinished.json").write_text('{"made_by": "me"}')
    (others[2] / "spiel-peft-unfinished.json").write_text(json.dumps({"made_by": "spiel-peft", "for": "target"}))
    with work_folder(tmp_path, "target") as at_work, whole_folder(tmp_path / "target") as work:
        # The folder of a process that lives is left alone.
        assert at_work.is_dir()
        (work / "file").write_text("new")
    assert all((other / "file").read_text() == "text" for other in others)
    assert not at_work.exists() and sorted(os.listdir(tmp_path)) == sorted(["target", *(p.name for p in others)])


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real = make(tmp_path / "disk" / "real", "old")
    target = link(tmp_path / "target", real)
    with whole_folder(target, overwrite=True) as work:
        (work / "file").write_text("new")
    assert target.is_symlink() and (real / "file").read_text() == "new"
    assert [path.name for path in real.parent.iterdir()] == ["real"]


def test_functions_refuse_it_as_the_commands_do(tmp_path: Path) -> None:
    base, adapter = make(tmp_path / "base"), make(tmp_path / "adapter")
    calls: dict[str, Callable[[Path], object]] = {
        "merge": lambda out: merge_adapter_into_checkpoint(base, adapter, out, overwrite=True),
        "extract": lambda out: extract_delta(base, adapter, out, r=1, overwrite=True),
        "shira": lambda out: export_shira(adapter, out, base, overwrite=True),
        "patch": lambda out: export_sparse_patch(adapter, out, base, overwrite=True),
        "diff": lambda out: export_dense_diff(adapter, out, base, overwrite=True),
    }
    for name, call in calls.items():
        for out in (base, adapter, tmp_path, base / "new", tmp_path / "x" / ".." / "adapter"):
            with pytest.raises(ValueError, match="which is read"):
                call(out)
            assert (base / "file").read_text() == (adapter / "file").read_text() == "text", name
