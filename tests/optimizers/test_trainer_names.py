"""Optimizers by the names that transformers' `TrainingArguments` has for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.adapters import deltas_of, indices_of, log_of
from support.runs import assert_sound, moved
from support.trainer_runs import regression, trainer

NAMES = [
    "adamw_torch",
    "adamw_torch_fused",
    "sgd",
    "adagrad",
    "rmsprop",
    "adafactor",
    "adamw_bnb_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion_32bit",
    "lion_8bit",
    "ademamix",
    "ademamix_8bit",
    "rmsprop_bnb",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_trains_and_closes(tmp_path: Path, name: str) -> None:
    model = regression()
    before = indices_of(model)
    trainer(model, tmp_path, optim=name, max_steps=7, max_grad_norm=0.1).train()
    assert [report.step for report in log_of(model)] == [2, 6]
    for module, delta in deltas_of(model).items():
        assert_sound(delta, before[module].numel())
        assert moved(before[module], delta.indices)
