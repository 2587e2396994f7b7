"""A sparse patch that an earlier version of the code exported."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from support.tensors import assert_same_bits

from spiel_peft import export_sparse_patch
from spiel_peft.convert import read_sparse_patches

from .models import DATA, mixed

ADAPTER = DATA / "checkpoints" / "adamw"


def test_the_patch_is_exported_as_it_was(tmp_path: Path) -> None:
    export_sparse_patch(ADAPTER, tmp_path / "patch", mixed(torch.bfloat16))
    patches = {patch.name: patch for patch in read_sparse_patches(tmp_path / "patch")}
    recorded = {patch.name: patch for patch in read_sparse_patches(DATA / "patch")}
    assert patches.keys() == recorded.keys() and len(recorded) == 5
    for name, patch in recorded.items():
        assert patches[name].full_shape == patch.full_shape
        assert_same_bits(patches[name].indices, patch.indices, name)
        assert_same_bits(patches[name].values, patch.values, name)


def test_the_recorded_patch_is_what_a_merge_gives() -> None:
    """Computed independently: base in bfloat16, deltas added in float32, rounded once."""
    adapter = load_file(ADAPTER / "adapter_model.safetensors")
    weights = dict(mixed(torch.bfloat16).named_parameters())
    for patch in read_sparse_patches(DATA / "patch"):
        layer = patch.name.removesuffix(".weight")
        indices = adapter[f"base_model.model.{layer}.spiel_delta.indices"].long()
        values = adapter[f"base_model.model.{layer}.spiel_delta.values"]
        original = weights[patch.name].detach().flatten()
        merged = original.clone()
        merged[indices] = (original[indices].float() + values).bfloat16()
        changed = (merged != original).nonzero().flatten()
        assert_same_bits(patch.indices, changed.to(torch.int32), patch.name)
        assert_same_bits(patch.values, merged[changed], patch.name)
