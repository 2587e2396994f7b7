"""A trained `PeftModel` given to TRL: its "ref" adapter equals the policy at step 0, indices included, and stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.adapters import deltas_of, indices_of, log_of
from support.adapters import train as train_a_little
from support.models import quantized_llama
from support.runs import assert_same_run, moved
from torch import Tensor, nn

from .helpers import Watch, adapted, assert_reloads, outputs
from .trl_runs import KINDS, OLD_KTO

STAGES = ["DPO", "GRPO", "RLOO"] if OLD_KTO else ["DPO", "KTO", "GRPO", "RLOO"]


def first_stage(folder: Path, base: nn.Module | None = None) -> PeftModel:
    """An adapter that has been trained past its first close, saved, and loaded to be trained further."""
    model = adapted(base=base)
    drawn = indices_of(model)
    train_a_little(model, 3, lr=0.02)
    assert all(moved(drawn[name], delta.indices) for name, delta in deltas_of(model).items())
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(model.unload(), folder, is_trainable=True)


def copies(model: nn.Module, adapter: str) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (delta.indices.clone(), delta.values.detach().clone())
        for name, delta in deltas_of(model, adapter).items()
    }


def assert_equal(model: nn.Module, adapter: str, expected: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, (indices, values) in copies(model, adapter).items():
        assert torch.equal(indices, expected[name][0]), name
        assert values.dtype == torch.float32 and torch.equal(values, expected[name][1]), name


def with_reference(model: PeftModel) -> Tensor:
    model.set_adapter("ref")
    reference = outputs(model)
    model.set_adapter("default")
    return reference


@pytest.mark.parametrize("name", STAGES)
def test_it_equals_the_policy_at_step_0_and_stays(name: str, tmp_path: Path) -> None:
    model = first_stage(tmp_path / "first")
    start, before = copies(model, "default"), outputs(model)
    trainer = KINDS[name].build(model, tmp_path, beta=0.1)
    assert sorted(model.peft_config) == ["default", "ref"]
    assert_equal(model, "ref", start)
    assert torch.equal(with_reference(model), before)
    watch = Watch(model, KINDS[name].loss)
    trainer.train()
    watch.check([2, 6, 10], 10, margin=0.01, fresh=False)
    assert_equal(model, "ref", start)
    assert torch.equal(with_reference(model), before)
    trainer.save_model(str(tmp_path / "adapter"))
    assert_reloads(model, tmp_path / "adapter")


@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_switching_to_it_in_the_middle_of_a_step_changes_nothing(name: str, tmp_path: Path) -> None:
    """A run that asked it everything beforehand is the same."""
    models = []
    for precomputed in (False, True):
        model = first_stage(tmp_path / "first")
        KINDS[name].build(model, tmp_path, precompute_ref_log_probs=precomputed, max_steps=7).train()
        models.append(model)
    assert sum(report.replaced for report in log_of(models[0])) > 0
    assert_same_run(*models)


def test_the_first_loss_is_that_of_equal_models(tmp_path: Path) -> None:
    trainer = KINDS["DPO"].build(first_stage(tmp_path / "first"), tmp_path, max_steps=1, logging_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert trainer.state.log_history[0]["rewards/margins"] == 0


def test_a_cast_of_the_policy_alone_is_undone_without_loss(tmp_path: Path) -> None:
    """On a 4-bit base TRL rounds the policy to bfloat16, and not the reference."""
    model = first_stage(tmp_path / "first", quantized_llama(tmp_path))
    start = copies(model, "default")
    trainer = KINDS["DPO"].build(model, tmp_path, max_steps=1, learning_rate=0.0)
    assert {delta.values.dtype for delta in deltas_of(model).values()} == {torch.bfloat16}
    trainer.train()
    assert_equal(model, "default", start)
    assert_equal(model, "ref", start)
