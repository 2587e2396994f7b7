"""`spiel-peft info` prints the numbers that the files hold."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spiel_peft.inspection.facts import by_number
from spiel_peft_cli.tables import count

from .helpers import Shell


def deltas_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Indices and values by module, read without this package."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, name = key.removeprefix("base_model.model.").rpartition(".spiel_delta.")
        found.setdefault(module, {})[name] = tensor
    return found


def test_numbers_by_module(shell: Shell, folders: Path) -> None:
    (data,) = shell.json("info", "language", "--base", "base")["adapters"]
    files = deltas_of(folders / "language")
    weights = load_file(folders / "base" / "model.safetensors")
    assert [m["module"] for m in data["modules"]] == list(files)
    for module in data["modules"]:
        values = files[module["module"]]["values"].double()
        weight = weights[f"{module['module']}.weight"]
        assert module["deltas"] == len(values) and module["shape"] == list(weight.shape)
        assert module["density"] == len(values) / weight.numel()
        assert module["norm"] == pytest.approx(float(values.square().sum().sqrt()))
        assert module["mean_abs"] == pytest.approx(float(values.abs().mean()))
        assert module["max_abs"] == float(values.abs().max())
    every = torch.cat([entries["values"].double() for entries in files.values()])
    sizes = sum(weights[f"{module}.weight"].numel() for module in files)
    assert (data["deltas"], data["weights"]) == (len(every), sizes)
    assert data["density"] == len(every) / sizes
    assert data["norm"] == pytest.approx(float(every.norm()))
    assert data["mean_abs"] == pytest.approx(float(every.abs().mean()))
    assert data["budget"] == {"density": 0.2} and data["training"] is None
    assert data["settings"]["target_modules"] == ["down_proj", "q_proj"]


def test_without_a_base_shapes_come_from_the_training_state(shell: Shell) -> None:
    trained, other = shell.json("info", "adapter", "language")["adapters"]
    assert trained["modules"][0]["shape"] == [64, 128]
    assert trained["training"] == {"step": 6, "closes": 2, "total_steps": 0}
    assert other["modules"][0]["shape"] is None and other["density"] is None


def test_a_config_tells_the_shapes(shell: Shell, folders: Path) -> None:
    (folders / "base" / "model.safetensors").unlink()
    (data,) = shell.json("info", "language", "--base", "base")["adapters"]
    assert data["density"] == pytest.approx(0.2, abs=1e-4)


def test_overlap_is_counted_entry_by_entry(shell: Shell, folders: Path) -> None:
    names = ["language", "task", "other_adapter"]
    data = shell.json("info", *names)["overlap"]
    entries = {
        name: {
            (module, position): value
            for module, d in deltas_of(folders / name).items()
            for position, value in zip(d["indices"].tolist(), d["values"].tolist(), strict=True)
        }
        for name in names
    }
    assert len(data["pairs"]) == 3
    for pair in data["pairs"]:
        a, b = (entries[name] for name in pair["adapters"])
        assert pair["shared"] == len(a.keys() & b.keys())
        assert pair["union"] == len(a.keys() | b.keys())
        assert pair["conflicts"] == sum(a[key] * b[key] < 0 for key in a.keys() & b.keys())
        assert math.isclose(pair["fraction"], pair["shared"] / pair["union"])
    assert data["total"]["union"] == len(set().union(*entries.values()))


def test_what_people_read(shell: Shell) -> None:
    text = shell("info", "adapter", "language", "--base", "base")
    assert "budget     r=2" in text and "growth     random, every 3 steps" in text
    assert "training   step 6, 2 closes" in text and "Overlap" in text
    assert "model.layers.1.self_attn.q_proj" in text and "64x128" in text
    assert "model.layers" not in shell("info", "adapter", "--summary")


def test_another_models_base_is_refused(shell: Shell, folders: Path) -> None:
    from support.models import tiny_llama

    tiny_llama(num_hidden_layers=1).save_pretrained(folders / "small")
    message = shell.fails("info", "language", "--base", "small", code=3)
    assert "adapter_model.safetensors" in message and "model.layers.0.mlp.down_proj" in message
    assert "(16, 24)" in message


def test_one_adapter_twice_is_wrong_usage(shell: Shell) -> None:
    assert "given twice" in shell.fails("info", "task", "task", code=2)


def test_layers_are_sorted_by_their_number(shell: Shell, folders: Path) -> None:
    file = folders / "task" / "adapter_model.safetensors"
    numbers = {"layers.0.": "layers.10.", "layers.1.": "layers.2."}
    tensors = {}
    for key, tensor in load_file(file).items():
        old = next(part for part in numbers if part in key)
        tensors[key.replace(old, numbers[old])] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    lines = [line for line in shell("info", "task").splitlines() if "layers." in line]
    assert [line.split()[0].split(".")[2] for line in lines] == ["2", "2", "10", "10"]
    data = shell.json("info", "task", "language")
    modules = [module["module"] for module in data["adapters"][0]["modules"]]
    assert [name.split(".")[2] for name in modules] == ["2", "2", "10", "10"]
    layers = [int(name.split(".")[2]) for name in data["overlap"]["modules"]]
    assert layers == sorted(layers) and layers[-1] == 10


def test_names_with_numbers_anywhere() -> None:
    names = ["h.10.a", "h.2.b", "h.2.a", "10", "2", "", "a2b", "a10", "a", "h.2"]
    assert sorted(names, key=by_number) == ["", "2", "10", "a", "a2b", "a10", "h.2", "h.2.a", "h.2.b", "h.10.a"]


def test_one_of_a_thing_is_singular(shell: Shell) -> None:
    assert [count(n, "close") for n in (0, 1, 2, 1000)] == ["0 closes", "1 close", "2 closes", "1,000 closes"]
    run = ["train", "--model", "base", "--data", "train.jsonl", "-o", "run", "--r", "1", "--max-steps", "1"]
    shell(*run, "--regrow-every", "1", "--accumulation-steps", "1", "--target-module", "0.self_attn.q_proj")
    assert "; 1 step\n" in shell.out and "1 close of the cycle" in shell.out
    text = shell("info", "run/adapter")
    assert "step 1 of 1, 1 close;" in text and "every 1 step," in text and "in 1 module," in text
