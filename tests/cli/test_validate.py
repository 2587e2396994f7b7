"""`spiel-peft validate` lists every kind of damage at once, and nothing in sound files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import adapted, edit_adapter, key_of
from support.models import tiny_llama
from torch import Tensor

from spiel_peft.inspection import validate_adapter

from .helpers import Shell

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
Tensors = dict[str, Tensor]


def indices(tensors: Tensors, module: str = Q) -> Tensor:
    return tensors[key_of(module, "indices")]


def values(tensors: Tensors, module: str = Q) -> Tensor:
    return tensors[key_of(module, "values")]


def put(tensors: Tensors, name: str, change: Callable[[Tensor], Tensor], module: str = Q) -> None:
    tensors[key_of(module, name)] = change(tensors[key_of(module, name)])


# Damage of a file, the tensor that must be named, and the problem that must be reported. Without a base.
DAMAGE: dict[str, tuple[Callable[[Tensors], Any], str, str]] = {
    "unsorted": (lambda t: put(t, "indices", lambda i: i.flip(0)), "indices", "not sorted"),
    "repeated": (lambda t: indices(t)[1:2].copy_(indices(t)[:1]), "indices", "more than once"),
    "negative": (lambda t: indices(t)[:1].fill_(-3), "indices", "negative position"),
    "floating indices": (lambda t: put(t, "indices", Tensor.float), "indices", "dtype"),
    "NaN": (lambda t: values(t)[:1].fill_(float("nan")), "values", "not finite"),
    "infinite": (lambda t: values(t)[:1].fill_(float("inf")), "values", "not finite"),
    "integer values": (lambda t: put(t, "values", Tensor.int), "values", "floating dtype"),
    "8-bit values": (
        lambda t: put(t, "values", lambda v: v.to(torch.float8_e4m3fn)),
        "values",
        "floating dtype, got torch.float8",
    ),
    "one value less": (lambda t: put(t, "values", lambda v: v[1:]), "values", "must have shape"),
    "no values": (lambda t: t.pop(key_of(Q, "values")), "values", "is missing"),
    "no indices": (lambda t: t.pop(key_of(Q, "indices")), "indices", "is missing"),
    "another name": (lambda t: t.update({key_of(Q, "ages"): torch.ones(2)}), "ages", "not a tensor of a SpIEL"),
    "adapter's name": (lambda t: t.update({key_of(Q, "default.values"): torch.ones(2)}), "default", "names an adapter"),
    "foreign": (lambda t: t.update({"base_model.model.score.weight": torch.ones(2)}), "score", "not in the config"),
}


@pytest.fixture
def sound(shell: Shell, folders: Path) -> Path:
    """An adapter without training state."""
    return folders / "language"


def problems(shell: Shell, *arguments: object) -> list[dict[str, Any]]:
    data = shell.json("validate", *arguments, code=1)
    assert data["valid"] is False
    return [problem for adapter in data["adapters"] for problem in adapter["problems"]]


@pytest.mark.parametrize(("damage", "tensor", "what"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found(damage: Callable[[Tensors], Any], tensor: str, what: str, shell: Shell, sound: Path) -> None:
    edit_adapter(sound, damage)
    found = problems(shell, sound)
    assert any(tensor in (p["tensor"] or "") and what in p["problem"] for p in found), found
    assert all(Path(p["file"]).name == "adapter_model.safetensors" for p in found)


def test_sound_adapters_have_no_findings(shell: Shell, folders: Path) -> None:
    data = shell.json("validate", "adapter", "language", "task", "--base", "base")
    assert data["valid"] and [a["problems"] for a in data["adapters"]] == [[], [], []]
    assert shell("validate", "adapter").split() == ["adapter:", "sound"]


SETTINGS: dict[str, dict[str, Any]] = {
    "num_deltas": {"num_deltas": 333},
    "counts": {"num_deltas": {Q: 7, DOWN: 9}},
    "patterns": {"rank_pattern": {"q_proj": 1}, "density": 0.1},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*layers\.1\..*(q_proj|up_proj)"},
    "layers": {"layers_to_transform": [1]},
    "biases and head": {"bias": "all", "modules_to_save": ["lm_head"]},
    "tied": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [1, 2]},
    "clamped": {"density": 1.0},
    "default targets": {"target_modules": None},
}


@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)
def test_every_kind_of_config_is_sound(fields: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_llama(tied=fields.get("ensure_weight_tying", False))
    base.save_pretrained(tmp_path / "base")
    adapted(base, **fields).save_pretrained(tmp_path / "adapter")
    assert validate_adapter(tmp_path / "adapter") == []
    assert validate_adapter(tmp_path / "adapter", tmp_path / "base") == []


def test_all_problems_are_listed(shell: Shell, sound: Path) -> None:
    def damage(tensors: Tensors) -> None:
        put(tensors, "indices", lambda i: i.flip(0))
        values(tensors)[0] = float("nan")
        values(tensors, DOWN)[0] = float("nan")
        tensors["base_model.model.score.weight"] = torch.full((2,), float("inf"))

    edit_adapter(sound, damage)
    found = {(p["tensor"], p["problem"].split(" (")[0]) for p in problems(shell, sound)}
    assert {name for name, _ in found} == {
        f"{Q}.spiel_delta.indices",
        f"{Q}.spiel_delta.values",
        f"{DOWN}.spiel_delta.values",
        "score.weight",
    }
    assert len(found) == 5  # the foreign tensor has two
    text = shell("validate", sound, code=1)
    assert f"{sound}: 5 problems" in text and text.count("\n") == 6


def test_range_and_budget_need_the_base(shell: Shell, folders: Path, sound: Path) -> None:
    edit_adapter(sound, lambda t: indices(t)[-1:].fill_(64 * 64))
    assert shell.json("validate", sound)["valid"]
    (found,) = problems(shell, sound, "--base", "base")
    assert found["tensor"] == f"{Q}.spiel_delta.indices" and "out of range (4096" in found["problem"]


def test_another_base(shell: Shell, folders: Path, sound: Path) -> None:
    tiny_llama(hidden_size=64, intermediate_size=96, num_hidden_layers=1).save_pretrained(folders / "small")
    found = problems(shell, sound, "--base", "small")
    missing = [p for p in found if "does not have" in p["problem"]]
    assert len(missing) == 2 and all("layers.1" in p["tensor"] for p in missing)
    budget = [p for p in found if p["tensor"] == "density"]
    assert any("layers.0.mlp.down_proj" in p["problem"] and "(64, 96)" in p["problem"] for p in budget)


@pytest.mark.parametrize(
    ("rows", "needs_base", "what"),
    [
        ([1], False, r"shape \(2, 16\), but trainable_token_indices names 1 rows"),
        ({"lm_head": [1, 2]}, False, "holds rows of 'model.embed_tokens', which the config's"),
        ([1, 40], True, "holds row 40, but the weight in .* has 40 rows"),
    ],
)
def test_trained_tokens_that_the_config_does_not_fit(rows: Any, needs_base: bool, what: str, tmp_path: Path) -> None:
    base, folder = tiny_llama(), tmp_path / "adapter"
    adapted(base, trainable_token_indices=[1, 2]).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trainable_token_indices": rows}))
    if needs_base:
        assert validate_adapter(folder) == []
    (finding,) = validate_adapter(folder, tiny_llama() if needs_base else None)
    assert finding.tensor == "model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert re.search(what, finding.problem)


CONFIGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "targets too few": ({"target_modules": ["q_proj"]}, "target_modules", "does not select 'model.layers.0.mlp.down"),
    "targets too many": ({"target_modules": ["q_proj", "down_proj", "o_proj"]}, "target_modules", "has 'o_proj'"),
    "head not there": ({"modules_to_save": ["lm_head"]}, "modules_to_save", "has 'lm_head', but the file does not"),
    "counts": ({"density": None, "num_deltas": {Q: 3}, "target_modules": None}, "num_deltas", f"has 3 for '{Q}'"),
}


@pytest.mark.parametrize(("fields", "field", "what"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_does_not_agree(fields: dict[str, Any], field: str, what: str, shell: Shell, sound: Path) -> None:
    path = sound / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    found = problems(shell, sound)
    assert any(p["tensor"] == field and what in p["problem"] for p in found), found
    assert {p["file"] for p in found} == {str(path)}


def test_a_wrong_budget(shell: Shell, sound: Path) -> None:
    path = sound / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "density": 0.3}))
    found = problems(shell, sound, "--base", "base")
    assert len(found) == 4 and all(p["tensor"] == "density" for p in found)


def test_training_state_is_checked(shell: Shell, folders: Path) -> None:
    edit_adapter(folders / "adapter", lambda t: t[key_of(Q, "spiel_progress")][0].fill_(-4))
    (found,) = problems(shell, "adapter")
    assert found["tensor"].endswith("spiel_progress") and "out of range" in found["problem"]
    edit_adapter(folders / "adapter", lambda t: [t.pop(key_of(Q, name)) for name in ("values", "indices")])
    assert any("of a delta that is missing" in p["problem"] for p in problems(shell, "adapter"))


def test_files_that_cannot_be_read_are_findings(shell: Shell, sound: Path) -> None:
    file = sound / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    (found,) = problems(shell, sound)
    assert found["file"] == str(file) and found["tensor"] is None
    file.unlink()
    (sound / "adapter_config.json").write_text("{")
    assert {p["file"] for p in problems(shell, sound)} == {str(file), str(sound / "adapter_config.json")}


def test_another_method_is_a_finding_and_nothing_is_bad_input(shell: Shell) -> None:
    (found,) = problems(shell, "their_adapter")
    assert "'SHIRA'" in found["problem"]
    assert "nowhere" in shell.fails("validate", "nowhere", code=3)
    assert "train.jsonl" in shell.fails("validate", "task", "--base", "train.jsonl", code=3)
