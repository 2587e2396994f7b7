"""Custom loops: plain PyTorch and Accelerate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from support.adapters import log_of
from support.models import tiny_llama
from support.text import sentences
from torch.utils.data import DataLoader

from .helpers import Watch, adapted, assert_reloads, batches, config, loss_of, optimizer_of


def test_plain_loop(tmp_path: Path) -> None:
    model = adapted(total_steps=12)
    watch, optimizer = Watch(model), optimizer_of(model)
    model.train()
    for ids in batches():
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.check([2, 6, 10], 12)
    model.save_pretrained(tmp_path)
    assert_reloads(model, tmp_path)


def test_plain_loop_of_unknown_length() -> None:
    """The share of replaced deltas follows the learning rate."""
    model = adapted()
    watch, optimizer = Watch(model), optimizer_of(model)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)
    model.train()
    for ids in batches():
        loss_of(model, ids).backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    watch.check([2, 6, 10], None)
    assert [r.rate for r in log_of(model)] == pytest.approx([1.0, *(0.2 * (1 - 0.9 * step / 12) for step in (5, 9))])


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_accelerate_loop(micro_batches: int, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), config(total_steps=12))
    watch = Watch(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    optimizer = optimizer_of(model)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)
    loader = DataLoader(torch.tensor(sentences()), batch_size=8 // micro_batches)
    wrapped, stepper, loader, decay = accelerator.prepare(model, optimizer, loader, decay)
    wrapped.train()
    for _ in range(3):
        for ids in loader:
            with accelerator.accumulate(wrapped):
                accelerator.backward(loss_of(wrapped, ids))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                stepper.step()
                decay.step()
                stepper.zero_grad()
    watch.check([2, 6, 10], 12)
    accelerator.unwrap_model(wrapped).save_pretrained(tmp_path)
    assert_reloads(model, tmp_path)
