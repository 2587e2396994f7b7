"""A saved tiny base model with a saved, trained adapter on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.adapters import adapted, edit_adapter, train
from support.models import logits, tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Saved:
    """Folders of a base model and of an adapter trained on it, and the adapted model's logits."""

    base: Path
    adapter: Path
    logits: Tensor

    def load_base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=dtype)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """An adapter in the middle of an open candidate window."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_llama().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = adapted(base, regrow_every=4, accumulation_steps=2, total_steps=20)
    train(model, steps=5)
    model.save_pretrained(folder / "adapter")
    return Saved(folder / "base", folder / "adapter", logits(model))


@pytest.fixture
def damaged(saved: Saved, tmp_path: Path) -> Callable[[Callable[[dict[str, Tensor]], object]], Path]:
    """A function that copies the saved adapter and applies an edit to its tensors; returns the copy's folder."""

    def copy(edit: Callable[[dict[str, Tensor]], object]) -> Path:
        folder = tmp_path / "damaged"
        folder.mkdir()
        for file in saved.adapter.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        edit_adapter(folder, edit)
        return folder

    return copy
