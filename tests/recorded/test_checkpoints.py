"""Checkpoints that an earlier version wrote in the middle of a window, and the results of continuing them."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.adapters import layers_of, trainable
from support.runs import everything
from support.tensors import assert_same_bits
from torch import Tensor

from .models import DATA, MID_WINDOW, OPTIMIZERS, digests, mixed, train
from .record import AFTER_CHECKPOINT


def resumed(name: str) -> tuple[PeftModel, torch.optim.Optimizer]:
    folder = DATA / "checkpoints" / name
    model = PeftModel.from_pretrained(mixed(), folder, is_trainable=True).train()
    optimizer = OPTIMIZERS[name](trainable(model))
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    return model, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_recorded_checkpoint_is_read_whole(name: str) -> None:
    model, _ = resumed(name)
    stored = load_file(DATA / "checkpoints" / name / "adapter_model.safetensors")
    held: dict[str, Tensor] = {}
    for layer in layers_of(model):
        delta = layer.spiel_delta["default"]
        tensors = {"indices": delta.indices, "values": delta.values.detach(), **delta.training_tensors()}
        held |= {f"base_model.model.{layer.module_name}.spiel_delta.{key}": t for key, t in tensors.items()}
    assert held.keys() == stored.keys()
    for key, tensor in stored.items():
        assert_same_bits(held[key], tensor, key)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_recorded_checkpoint_is_trained_on_as_it_was(name: str, same_arithmetic: bool) -> None:
    expected = json.loads((DATA / "checkpoints" / name / "after.json").read_text(encoding="utf-8"))
    model, optimizer = resumed(name)
    losses = train(model, optimizer, MID_WINDOW + 1, AFTER_CHECKPOINT)
    assert losses == pytest.approx(expected["losses"], rel=0.01)
    if same_arithmetic:
        assert losses == expected["losses"]
        assert digests(everything(model, optimizer)) == expected["digests"]
