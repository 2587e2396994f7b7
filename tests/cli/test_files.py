"""`merge`, `extract`, `combine`, `convert`: the commands write what the functions write, and report it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.checkpoints import contents, loaded, tensors_of, unmerged_logits
from support.models import logits

from spiel_peft.files.adapter_file import read_adapter

from .helpers import Shell


def test_merging_gives_the_adapters_outputs(shell: Shell, folders: Path) -> None:
    data = shell.json("merge", "language", "--base", "base", "--out", "merged")
    assert torch.equal(logits(loaded(folders / "merged")), unmerged_logits(folders / "base", folders / "language"))
    assert data["deltas"] == 4914 and data["lost"] == 0 and data["dtypes"] == ["float32"]
    assert sum(m["deltas"] for m in data["modules"].values()) == data["deltas"]


def test_merging_in_half_precision_says_what_is_lost(shell: Shell) -> None:
    text = shell("merge", "language", "--base", "base", "--out", "merged", "--dtype", "bfloat16")
    assert "rounding to bfloat16 lost" in text and "of 4,914 deltas" in text
    data = shell.json("merge", "task", "--base", "base", "--out", "tiny", "--dtype", "bfloat16", "--weight", "1e-3")
    assert data["lost_share"] > 0.3
    assert any("Rounding to bfloat16 lost" in warning for warning in data["warnings"])
    assert "warning: Rounding" in shell.err


def test_merging_several_with_weights(shell: Shell, folders: Path) -> None:
    shell("merge", "language", "task", "--base", "base", "--out", "a", "--weight", "1", "--weight", "-0.5")
    shell("combine", "language", "task", "--weight", "1", "--weight", "-0.5", "--out", "both")
    shell("merge", "both", "--base", "base", "--out", "b")
    for key, tensor in tensors_of(folders / "a").items():
        torch.testing.assert_close(tensor, tensors_of(folders / "b")[key], rtol=1e-6, atol=1e-6)


def test_merging_into_what_a_quantized_run_saw(shell: Shell, folders: Path) -> None:
    pytest.importorskip("bitsandbytes")
    merge = ["merge", "language", "--base", "base", "--out"]
    shell(*merge, "plain")
    shell(*merge, "nf4", "--trained-on", "nf4", "--double-quant", "--load-dtype", "bfloat16")
    plain, nf4 = tensors_of(folders / "plain"), tensors_of(folders / "nf4")
    name = "model.layers.0.self_attn.k_proj.weight"
    assert not torch.equal(plain[name], nf4[name]) and torch.allclose(plain[name], nf4[name], atol=0.2)
    assert "--trained-on" in shell.fails(*merge, "x", "--double-quant", code=2)
    assert "nf4, fp4, int8" in shell.fails(*merge, "x", "--trained-on", "int3", code=2)


def test_extracting_the_whole_difference(shell: Shell, folders: Path) -> None:
    pair = ["--base", "base", "--finetuned", "finetuned"]
    data = shell.json("extract", *pair, "--density", "1", "--norms-and-biases", "--out", "all")
    assert data["kept"] == pytest.approx(1) and data["left_out"] == {}
    model = PeftModel.from_pretrained(loaded(folders / "base"), folders / "all")
    torch.testing.assert_close(logits(model), logits(loaded(folders / "finetuned")))
    text = shell("extract", *pair, "--r", "1", "--target-module", "q_proj", "--rewind", "--out", "ticket")
    assert "256 deltas in 2 modules" in text and "--norms-and-biases" in text
    ticket = read_adapter("ticket")
    assert ticket.config.growth == "none" and not any(bool(d.values.any()) for d in ticket.deltas.values())


def test_extracting_by_count_and_scope(shell: Shell) -> None:
    pair = ["--base", "base", "--finetuned", "finetuned", "--num-deltas", "500"]
    by_module = shell.json("extract", *pair, "--exclude-module", "lm_head", "--out", "a")
    everywhere = shell.json("extract", *pair, "--exclude-module", "lm_head", "--scope", "global", "--out", "b")
    assert by_module["deltas"] == everywhere["deltas"] == 500
    assert everywhere["kept"] >= by_module["kept"] and "lm_head" not in by_module["modules"]


@pytest.mark.parametrize("budgets", [[], ["--r", "1", "--density", "0.1"]], ids=["none", "two"])
def test_extracting_takes_one_budget(budgets: list[str], shell: Shell) -> None:
    arguments = ["extract", "--base", "base", "--finetuned", "finetuned", "--out", "x", *budgets]
    assert "exactly one of --r, --density and --num-deltas" in shell.fails(*arguments, code=2)


def test_combining(shell: Shell, folders: Path) -> None:
    data = shell.json("combine", "language", "task", "--weight", "2", "--weight", "-1", "--out", "sum")
    deltas = read_adapter("sum").deltas
    assert data["deltas"] == sum(d.k for d in deltas.values()) == data["overlap"]["union"]
    assert data["overlap"]["shared"] == 3276
    parts = {name: read_adapter(name).deltas for name in ("language", "task")}
    module = "model.layers.0.mlp.down_proj"
    dense = torch.zeros(64 * 128)
    for name, weight in (("language", 2.0), ("task", -1.0)):
        dense[parts[name][module].indices.long()] += weight * parts[name][module].values
    torch.testing.assert_close(deltas[module].values, dense[deltas[module].indices.long()])
    assert "shared" in shell("combine", "language", "task", "--type", "ties", "--density", "0.5", "--out", "ties")
    shell("validate", "sum", "ties", "--base", "base")


def test_combining_says_what_does_not_go_together(shell: Shell) -> None:
    combine = ["combine", "language", "task", "--out", "x"]
    assert "one --weight for each" in shell.fails(*combine, "--weight", "1", code=2)
    assert "--type svd" in shell.fails(*combine, "--type", "svd", code=3)
    assert "given twice" in shell.fails("combine", "task", "task", "--out", "x", code=2)
    assert not Path("x").exists()


def test_converting_there_and_back(shell: Shell, folders: Path) -> None:
    data = shell.json("convert", "their_adapter", "--base", "base", "--out", "mine")
    assert data["kind"] == "SHIRA" and data["num_deltas"] == 256 and len(data["modules"]) == 2
    theirs = logits(PeftModel.from_pretrained(loaded(folders / "base"), "their_adapter"))
    assert torch.equal(unmerged_logits(folders / "base", folders / "mine"), theirs)
    assert "SHIRA: 256 deltas" in shell("convert", "mine", "--to", "shira", "--base", "base", "--out", "back")
    assert torch.equal(logits(PeftModel.from_pretrained(loaded(folders / "base"), "back")), theirs)
    for target in ("sparse-patch", "dense-diff"):
        shell("convert", "mine", "--to", target, "--base", "base", "--out", target)
        assert any(Path(target).iterdir())


WRONG = {
    "no base": (["language", "--to", "shira"], 2, "--to shira needs --base"),
    "unknown format": (["language", "--to", "lora"], 2, "--to must be one of"),
    "r for another format": (["language", "--to", "dense-diff", "--base", "base", "--r", "3"], 2, "--r goes with"),
    "option of the other way": (
        ["language", "--to", "shira", "--base", "base", "--from", "sft"],
        2,
        "go with --to spiel",
    ),
    "converted already": (["language"], 3, "SpIEL adapter already"),
    "option the source has not": (["their_adapter", "--base", "base", "--drop-others"], 3, "no option"),
    "shapes not known": (["their_adapter"], 3, "shapes of the weights"),
    "unknown kind": (["their_adapter", "--from", "lora"], 3, "--from must be one of"),
}


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG.values(), ids=WRONG)
def test_wrong_conversions(arguments: list[str], code: int, message: str, shell: Shell) -> None:
    assert message in shell.fails("convert", *arguments, "--out", "x", code=code)
    assert not Path("x").exists()


WRITERS = {
    "merge": ["merge", "language", "--base", "base"],
    "extract": ["extract", "--base", "base", "--finetuned", "finetuned", "--r", "1"],
    "combine": ["combine", "language", "task"],
    "convert": ["convert", "their_adapter", "--base", "base"],
    "convert out": ["convert", "language", "--to", "dense-diff", "--base", "base"],
}


@pytest.mark.parametrize("arguments", WRITERS.values(), ids=WRITERS)
def test_what_is_there_is_replaced_only_on_request(arguments: list[str], shell: Shell, folders: Path) -> None:
    out = folders / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    before = contents(folders)
    assert "out exists already" in shell.fails(*arguments, "--out", "out", code=4)
    assert contents(folders) == before
    shell(*arguments, "--out", "out", "--overwrite")
    assert not (out / "mine.txt").exists() and len(list(out.iterdir())) > 0
