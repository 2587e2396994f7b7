"""No command destroys what it reads, and a training run removes only what it made."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from support.checkpoints import contents, tensors_of

from spiel_peft.files.folder import whole_folder
from spiel_peft.finetune import run, run_folder

from .helpers import Shell

TRAIN = ["train", "--model", "base", "--data", "data/train.jsonl", "--r", "2", "--accumulation-steps", "2"]
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    # The command line without its output, and what it reads.
    "extract": (["extract", "--base", "base", "--finetuned", "finetuned", "--r", "1"], ["base", "finetuned"]),
    "merge": (["merge", "task", "language", "--base", "base"], ["base", "task", "language"]),
    "combine": (["combine", "task", "language"], ["task", "language"]),
    "convert": (["convert", "their_adapter", "--base", "base"], ["their_adapter", "base"]),
    "to shira": (["convert", "task", "--to", "shira", "--base", "base"], ["task", "base"]),
    "to patch": (["convert", "task", "--to", "sparse-patch", "--base", "base"], ["task", "base"]),
    "to diff": (["convert", "task", "--to", "dense-diff", "--base", "base"], ["task", "base"]),
    "plot": (["plot", "task", "--base", "base", "--log", "data/train.jsonl"], ["task", "base", "data"]),
    "train": ([*TRAIN, "--eval-data", "more/eval.jsonl", "--config", "yaml/a.yaml"], ["base", "data", "more", "yaml"]),
}


@pytest.fixture
def inputs(folders: Path) -> Path:
    """The working directory, with the data of `TRAIN` in folders of their own."""
    for name, file in (("data", "train.jsonl"), ("more", "eval.jsonl")):
        (folders / name).mkdir()
        shutil.copyfile(folders / "train.jsonl", folders / name / file)
    (folders / "yaml").mkdir()
    (folders / "yaml" / "a.yaml").write_text("weight_decay: 0.1\n")
    return folders


@pytest.mark.parametrize("name", COMMANDS)
def test_outputs_that_are_inputs_are_refused(name: str, shell: Shell, inputs: Path) -> None:
    command, read = COMMANDS[name]
    option = "--output-dir" if name == "train" else "--out"
    before = contents(inputs)
    for folder in read:
        (inputs / "link").symlink_to(inputs / folder)
        outputs = [folder, ".", f"base/../{folder}", "link", str(inputs.parent)]
        outputs += [f"{folder}/new"] if folder not in ("data", "more", "yaml") else []
        for output in outputs:
            message = shell.fails(*command, option, output, "--overwrite", code=3)
            assert f"{option}: {output}" in message and "which is read" in message
            assert folder in message or output in (".", str(inputs.parent))
        (inputs / "link").unlink()
    assert contents(inputs) == before


def test_a_model_of_one_file(shell: Shell, inputs: Path) -> None:
    shutil.copytree("data", "model")
    Path("model/m.gguf").touch()
    for model in ("model/m.gguf", "model"):
        arguments = ["train", "--model", model, "--data", "data/train.jsonl", "--output-dir", "model", "--overwrite"]
        assert "would replace --model model/m.gguf" in shell.fails(*arguments, code=3)


def test_overwriting_that_fails_keeps_the_old_result(shell: Shell, folders: Path) -> None:
    merge = ["merge", "task", "--base", "base", "--out", "new"]
    shell(*merge)
    before = contents(folders)
    file = folders / "base" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-4])
    shell.fails(*merge, "--overwrite", code=3)
    file.write_bytes(data)
    assert contents(folders) == before
    assert "give --overwrite" in shell.fails(*merge, code=4)


def test_leftovers_of_a_killed_run_are_named(shell: Shell, folders: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_folder("new") as work:
        shutil.copytree(work.parent, "copy")  # as a kill leaves it
        raise ZeroDivisionError
    shutil.move("copy", ".new.spiel-peft-abcdefgh")
    shell("combine", "task", "language", "--out", "new")
    assert ".new.spiel-peft-abcdefgh, left by a run that was killed, was removed" in shell.err
    assert not Path(".new.spiel-peft-abcdefgh").exists()


# -- training --------------------------------------------------------------------------------------


def train(shell: Shell, *more: str, code: int = 0) -> str:
    return shell(*TRAIN, "--max-steps", "4", "--save-every", "2", "--output-dir", "run", *more, code=code)


def stop_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Interrupt the training of the test's next run after a step."""
    report = run._Report.on_step_end

    def interrupted(self: run._Report, args: object, state: object, control: object, **more: object) -> None:
        report(self, args, state, control, **more)
        if state.global_step == step:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    monkeypatch.setattr(run._Report, "on_step_end", interrupted)


def test_an_interrupted_run_removes_only_what_it_made(
    shell: Shell, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("checkpoint-1000", "checkpoint-1", "checkpoint-mine"):
        (inputs / "run" / name).mkdir(parents=True)
        (inputs / "run" / name / "precious.bin").write_text("mine")
    (inputs / "run" / "checkpoint-7").mkdir()
    before = contents(inputs)
    stop_in_step(monkeypatch, 1)
    train(shell, code=130)
    assert contents(inputs) == before and (inputs / "run" / "checkpoint-7").is_dir()
    monkeypatch.undo()
    monkeypatch.chdir(inputs)
    # A complete run keeps no more than two checkpoints of its own, and counts no others.
    train(shell, "--save-every", "1", "--max-steps", "6", "--held-out", "0", code=4)
    assert "checkpoint-1 is there" in shell.err and "move the folder" in shell.err
    shutil.rmtree(inputs / "run" / "checkpoint-1")
    train(shell, "--save-every", "1", "--held-out", "0")
    assert (inputs / "run" / "checkpoint-1000" / "precious.bin").read_text() == "mine"
    numbers = [path.name for path in run_folder.checkpoints_in(inputs / "run")]
    assert numbers == ["checkpoint-3", "checkpoint-4", "checkpoint-7", "checkpoint-1000"]


def test_a_run_that_never_began_leaves_an_empty_folder_of_the_user(shell: Shell, inputs: Path) -> None:
    (inputs / "run").mkdir()
    train(shell, "--target-module", "no_such_proj", code=3)
    assert (inputs / "run").is_dir()
    shell(*TRAIN, "--output-dir", "a/b", "--target-module", "no_such_proj", code=3)
    assert not (inputs / "a").exists()


@pytest.mark.parametrize("name", ["adapter", "merged", "trainer_state.json"])
def test_what_looks_like_a_run_is_not_replaced(name: str, shell: Shell, inputs: Path) -> None:
    (inputs / "run").mkdir()
    (inputs / "run" / name).touch()
    train(shell, code=4)
    assert f"holds a run already ({name})" in shell.err


def test_overwriting_keeps_the_old_checkpoints_until_there_is_a_new_one(
    shell: Shell, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(shell)
    before = contents(inputs)
    stop_in_step(monkeypatch, 1)
    train(shell, "--overwrite", "--seed", "1", code=130)
    assert contents(inputs) == before

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.undo()
    monkeypatch.chdir(inputs)
    # The optimizer's state is written after the adapter, into a checkpoint of the same name.
    monkeypatch.setattr(run.SFTTrainer, "_save_optimizer_and_scheduler", fails)
    train(shell, "--overwrite", "--seed", "1", code=3)
    assert contents(inputs) == before
    monkeypatch.undo()
    monkeypatch.chdir(inputs)
    stop_in_step(monkeypatch, 3)
    train(shell, "--overwrite", "--seed", "1", code=130)
    # The new run has a checkpoint now, so none of the old run can be resumed by mistake.
    assert [path.name for path in run_folder.checkpoints_in(inputs / "run")] == ["checkpoint-2"]
    assert sorted(os.listdir("run")) == ["adapter", "checkpoint-2", "trainer_state.json"]


DAMAGE = {
    "no optimizer": lambda at: (at / "optimizer.pt").unlink(),
    "half an optimizer": lambda at: (at / "optimizer.pt").write_bytes((at / "optimizer.pt").read_bytes()[:5000]),
    "no scheduler": lambda at: (at / "scheduler.pt").unlink(),
    "no random state": lambda at: (at / "rng_state.pth").unlink(),
    "half a state": lambda at: (at / "trainer_state.json").write_text("{"),
    "no state": lambda at: (at / "trainer_state.json").unlink(),
    "half an adapter": lambda at: (at / "adapter_model.safetensors").write_bytes(
        (at / "adapter_model.safetensors").read_bytes()[:-9]
    ),
    "no adapter": lambda at: (at / "adapter_model.safetensors").unlink(),
    "no config": lambda at: (at / "adapter_config.json").unlink(),
    "nothing": lambda at: [path.unlink() for path in at.iterdir()],
    "changed bytes": lambda at: (at / "optimizer.pt").write_bytes(flip((at / "optimizer.pt").read_bytes())),
}


def flip(data: bytes) -> bytes:
    """The data with zeros in the middle, as a crash of the machine leaves them."""
    middle = len(data) // 2
    return data[: middle - 200] + bytes(400) + data[middle + 200 :]


def test_what_makes_a_checkpoint_incomplete(shell: Shell, inputs: Path) -> None:
    train(shell)
    whole, copy = inputs / "run" / "checkpoint-4", inputs / "copy"
    assert run_folder.what_is_missing(whole) is None
    for name, damage in DAMAGE.items():
        shutil.copytree(whole, copy)
        damage(copy)
        problem = run_folder.what_is_missing(copy)
        assert problem is not None and "." in problem, name
        shutil.rmtree(copy)
    (whole / run_folder.WRITING).write_text("{}")  # all files are there, but perhaps not in full
    assert run_folder.what_is_missing(whole) == "the run was killed while it was written"


@pytest.mark.parametrize("name", ["half an optimizer", "nothing"])
def test_resuming_falls_back_to_the_last_complete_checkpoint(name: str, shell: Shell, inputs: Path) -> None:
    train(shell)
    before = tensors_of(inputs / "run" / "adapter")
    shutil.rmtree(inputs / "run" / "adapter")
    (inputs / "run" / "checkpoint-4" / "optimizer.bin").write_bytes(b"of the first run")
    DAMAGE[name](inputs / "run" / "checkpoint-4")
    data = json.loads(train(shell, "--resume", "--json"))
    assert data["resumed_from"] == "run/checkpoint-2" and data["steps"] == 4
    assert "run/checkpoint-4" in data["warnings"][0] and "resuming from run/checkpoint-2" in data["warnings"][0]
    after = tensors_of(inputs / "run" / "adapter")
    assert all(after[key].equal(before[key]) for key in before)
    assert run_folder.what_is_missing(inputs / "run" / "checkpoint-4") is None
    assert not (inputs / "run" / "checkpoint-4" / "optimizer.bin").exists()


def test_a_damaged_checkpoint_is_there_until_the_new_one_is_whole(
    shell: Shell, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(shell)
    DAMAGE["half an optimizer"](inputs / "run" / "checkpoint-4")
    before = contents(inputs / "run" / "checkpoint-4")
    monkeypatch.setattr(run.SFTTrainer, "_save_optimizer_and_scheduler", lambda *_: 1 / 0)
    train(shell, "--resume", code=70)
    assert contents(inputs / "run" / "checkpoint-4") == before
    monkeypatch.undo()
    monkeypatch.chdir(inputs)
    # While it is written the new one has the mark, so that a kill leaves no mixture of both that seems complete.
    marks = []
    monkeypatch.setattr(
        run.SFTTrainer,
        "_save_optimizer_and_scheduler",
        lambda self, folder: marks.append(sorted(path.name for path in Path(folder).iterdir())),
    )
    train(shell, "--resume")
    assert all(run_folder.WRITING in names and "optimizer.pt" not in names for names in marks) and marks


def test_no_complete_checkpoint_and_one_of_a_killed_run(shell: Shell, inputs: Path) -> None:
    train(shell)
    DAMAGE["half a state"](inputs / "run" / "checkpoint-2")
    (inputs / "run" / "checkpoint-4" / run_folder.WRITING).write_text("{}")
    before = contents(inputs / "run" / "checkpoint-2")
    train(shell, "--resume", code=3)
    assert "checkpoint-4, left half-written by a run that was killed, was removed" in shell.err
    assert "no checkpoint that is complete: run/checkpoint-2 (trainer_state.json cannot be read" in shell.err
    assert not (inputs / "run" / "checkpoint-4").exists() and contents(inputs / "run" / "checkpoint-2") == before
