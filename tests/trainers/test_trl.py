"""TRL's trainers with `SpIELConfig` where `LoraConfig` was, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.adapters import log_of
from support.runs import assert_same_run

from .helpers import Watch, assert_reloads, config
from .trl_runs import KINDS


@pytest.mark.parametrize("name", KINDS)
def test_the_config_is_all_that_changes(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    trainer = kind.build(kind.base(), tmp_path, config(task_type=kind.task))
    watch = Watch(trainer.model, kind.loss)
    trainer.train()
    watch.check([2, 6, 10], 10)
    trainer.save_model(str(tmp_path / "adapter"))
    assert_reloads(trainer.model, tmp_path / "adapter", kind.base, kind.outputs)


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": False}], ids=str
)
def test_the_reference_of_dpo_is_the_adapter_disabled(settings: dict[str, Any], tmp_path: Path) -> None:
    """It runs between a policy's forward and backward; log-probabilities from before the training tell the same."""
    models = []
    for precomputed in (False, True):
        trainer = KINDS["DPO"].build(
            KINDS["DPO"].base(), tmp_path, config(), precompute_ref_log_probs=precomputed, max_steps=7, **settings
        )
        trainer.train()
        models.append(trainer.model)
    assert sum(report.replaced for report in log_of(models[0])[1:]) > 0
    assert_same_run(*models)
