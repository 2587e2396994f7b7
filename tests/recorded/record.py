"""Writes the files in ``data/``, which later versions of the code must read and reproduce.

    OMP_NUM_THREADS=1 PYTHONPATH=tests .venv/bin/python tests/recorded/record.py

Run it only when results are meant to change, from a clean checkout, and say in the commit what changed and why.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from safetensors.torch import save_file
from support.adapters import layers_of, trainable
from support.ranks import launch, results_of
from support.runs import everything

from recorded.models import (
    DATA,
    KINDS,
    MID_WINDOW,
    OPTIMIZERS,
    RUNS,
    adapt_mixed,
    digest,
    digests,
    machine,
    mixed,
    one_thread,
    results_of_kind,
    run,
    train,
    train_kind,
)
from spiel_peft import export_sparse_patch

# Steps after a checkpoint: the rest of its window, a close, and another window with its close.
AFTER_CHECKPOINT = 24


def save_adapter(model: PeftModel, folder: Path) -> None:
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def record_adapters() -> None:
    expected: dict[str, torch.Tensor] = {}
    for kind, (_, x) in KINDS.items():
        model = train_kind(kind)
        save_adapter(model, DATA / "adapters" / kind)
        results = results_of_kind(model, x)
        model.merge_adapter()
        merged = {"merged": layers_of(model)[0].get_base_weight().detach()}
        results["merged"] = torch.frombuffer(bytearray.fromhex(digest(merged)), dtype=torch.uint8)
        expected |= {f"{kind}.{name}": tensor.contiguous() for name, tensor in results.items()}
    save_file(expected, DATA / "adapters" / "expected.safetensors")


def record_checkpoints() -> None:
    for name, make in OPTIMIZERS.items():
        folder = DATA / "checkpoints" / name
        model = adapt_mixed("accumulated_gradient")
        optimizer = make(trainable(model))
        train(model, optimizer, 1, MID_WINDOW)
        save_adapter(model, folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        losses = train(model, optimizer, MID_WINDOW + 1, AFTER_CHECKPOINT)
        after = {"losses": losses, "digests": digests(everything(model, optimizer))}
        (folder / "after.json").write_text(json.dumps(after) + "\n", encoding="utf-8")


def record_patch() -> None:
    base = mixed(torch.bfloat16)
    export_sparse_patch(DATA / "checkpoints" / "adamw", DATA / "patch", base)


def record_runs() -> None:
    recorded = {name: [run(name)] for name in RUNS}
    with TemporaryDirectory() as scratch:
        launched = launch(str(Path(__file__).with_name("ranks_scenarios.py")), Path(scratch), ranks=2)
    recorded |= {f"{name}-two-ranks": results_of(launched, name) for name in RUNS}
    page = {"machine": machine(), "runs": recorded}
    (DATA / "runs.json").write_text(json.dumps(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir()
    with one_thread():
        record_adapters()
        record_checkpoints()
        record_patch()
        record_runs()
    for file in DATA.rglob("*.*"):
        file.chmod(0o644)
