"""`spiel-peft train` under `accelerate launch`: several processes are one run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cli.helpers import pairs, tokenizer
from safetensors.torch import load_file
from support.checkpoints import saved
from support.docs_blocks import ROOT, code_blocks, page
from support.models import tiny_llama
from torch.testing import assert_close

from spiel_peft_cli.main import main

(COMMAND,) = [
    shlex.split(line)
    for block in code_blocks(page("paper-setting.md"), "bash")
    for line in block.splitlines()
    if line.startswith("accelerate launch")
]
SMALL = shlex.split("--r 2 --batch-size 2 --epochs 1 --max-length 64 --save-every 4 --lr 1e-2 --growth none")


def launch(*options: object) -> str:
    """The page's command in two processes on the CPU; returns its stdout."""
    command = list(COMMAND)
    command[command.index("--num_processes") + 1] = "2"
    command[command.index("--module") : command.index("--module")] = [
        "--mixed_precision",
        "no",
        "--main_process_port",
        "0",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *command[2:], *SMALL, *map(str, options)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_are_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer().save_pretrained(saved(tiny_llama(hidden_size=32, intermediate_size=64), tmp_path / "llama-2-7b"))
    (tmp_path / "flan_v2.jsonl").write_text(pairs())
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    # In float32, so that the sums of two processes are those of one, up to rounding.
    settings = (
        (ROOT / "examples" / "llama2" / "ag.yaml").read_text(encoding="utf-8").replace("bf16: true", "bf16: false")
    )
    (tmp_path / "ag.yaml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    said = json.loads(launch("--config", "ag.yaml", "--grad-accum", 2, "--output-dir", "two", "--json"))
    assert said["steps"] == 8 and said["adapter"] == "two/adapter"
    assert (
        main(["train", "--config", "ag.yaml", "--data", "flan_v2.jsonl", *SMALL, "--grad-accum", "4", "-o", "one"]) == 0
    )
    one, two = (load_file(f"{name}/adapter/adapter_model.safetensors") for name in ("one", "two"))
    assert_close(two, one, rtol=1e-4, atol=1e-6)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "adapter",
        "checkpoint-4",
        "checkpoint-8",
        "trainer_state.json",
    ]
    assert {path.name for path in (tmp_path / "two" / "checkpoint-8").glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    assert not list((tmp_path / "two").rglob("*unfinished*"))
