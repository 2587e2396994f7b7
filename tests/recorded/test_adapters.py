"""Adapters on each kind of layer, saved in the middle of a window by an earlier version of the code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from support.adapters import layers_of
from support.layers import Single
from support.tensors import assert_close, assert_same_bits
from torch import Tensor

from .models import DATA, KINDS, digest, results_of_kind

FOLDER = DATA / "adapters"
FILE = "adapter_model.safetensors"
# Fields of the config that came after the files were recorded.
NEWER = {"candidates": None}


def loaded(kind: str) -> PeftModel:
    return PeftModel.from_pretrained(Single(KINDS[kind][0]()), FOLDER / kind, is_trainable=True).train()


def expected_of(kind: str) -> dict[str, Tensor]:
    stored = load_file(FOLDER / "expected.safetensors")
    return {name.removeprefix(f"{kind}."): t for name, t in stored.items() if name.startswith(f"{kind}.")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_adapter_gives_what_it_gave(kind: str, same_arithmetic: bool) -> None:
    model, expected = loaded(kind), expected_of(kind)
    for name, result in results_of_kind(model, KINDS[kind][1]).items():
        if same_arithmetic:
            assert_same_bits(result, expected[name], name)
        else:
            assert_close(result, expected[name], 2e-2 if result.dtype == torch.bfloat16 else 1e-5, name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_adapter_merges_into_the_same_weight(kind: str, same_arithmetic: bool) -> None:
    model = loaded(kind)
    layer = layers_of(model)[0]
    original = layer.get_base_weight().detach().clone()
    model.merge_adapter()
    merged = layer.get_base_weight().detach()
    # Plain weights are only added to and rounded; quantizing is bitsandbytes' work.
    if same_arithmetic or kind not in ("4bit", "8bit"):
        assert bytes(expected_of(kind)["merged"].tolist()).hex() == digest({"merged": merged})
    assert int((merged != original).sum()) >= 12
    model.unmerge_adapter()
    assert_same_bits(layer.get_base_weight().detach(), original)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_adapter_is_saved_as_it_was(kind: str, tmp_path: Path) -> None:
    loaded(kind).save_pretrained(tmp_path)
    with safe_open(FOLDER / kind / FILE, "pt") as old, safe_open(tmp_path / FILE, "pt") as new:
        assert new.metadata() == old.metadata()
        assert sorted(new.keys()) == sorted(old.keys())
        assert sum(".spiel_delta.spiel_" in name for name in old.keys()) > 3, "no training state in the recorded file"
        for name in old.keys():
            assert_same_bits(new.get_tensor(name), old.get_tensor(name), name)
    old_config, new_config = (
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")) for folder in (FOLDER / kind, tmp_path)
    )
    # PEFT's version, and whether the adapter was loaded for inference, differ from the recorded file.
    for field in ("peft_version", "inference_mode"):
        old_config.pop(field, None), new_config.pop(field, None)
    # PEFT also writes the Python module of the base model's class, which has moved since the files were recorded.
    assert old_config["auto_mapping"].pop("parent_library") == "helpers"
    assert new_config["auto_mapping"].pop("parent_library") == Single.__module__
    # Options that are newer than the recorded files stand at what the software did without them.
    assert {field: new_config.pop(field) for field in NEWER} == NEWER
    assert new_config == old_config
