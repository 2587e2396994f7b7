"""Trainers that cast a model: deltas are float32 in every step and lose no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from support.adapters import deltas_of, log_of
from support.models import quantized_llama
from support.runs import assert_same_run
from transformers import TrainerCallback
from trl import GRPOConfig

from .helpers import Watch, adapted, assert_reloads, config, tiny_llama
from .trl_runs import KINDS, OLD_KTO, tiny_scorer

CAUSAL = [name for name, kind in KINDS.items() if kind.task == "CAUSAL_LM" and not (OLD_KTO and name == "KTO")]


@pytest.mark.parametrize(("name", "bits"), [*((name, 4) for name in CAUSAL), ("SFT", 8)])
def test_trl_on_a_quantized_base(name: str, bits: int, tmp_path: Path) -> None:
    """The cast to bfloat16 is undone before the first step, on the Parameter objects that the optimizer holds."""
    fields = config(target_modules="all-linear")
    trainer = KINDS[name].build(quantized_llama(tmp_path, bits), tmp_path, fields, max_steps=3)
    deltas = deltas_of(trainer.model)
    quantized = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt}[bits]
    assert len(deltas) == sum(isinstance(m, quantized) for m in trainer.model.modules()) == 14
    assert {delta.values.dtype for delta in deltas.values()} == {torch.bfloat16}
    objects = {delta.values for delta in deltas.values()}
    trainer.train()
    held = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == objects == {delta.values for delta in deltas.values()}
    for p in held:
        assert p.dtype == torch.float32
        assert {t.dtype for t in trainer.optimizer.state[p].values()} == {torch.float32}
    assert [report.step for report in log_of(trainer.model)] == [2]


def test_a_run_on_a_4_bit_base(tmp_path: Path) -> None:
    def base() -> torch.nn.Module:
        return quantized_llama(tmp_path)

    trainer = KINDS["SFT"].build(base(), tmp_path, config(target_modules="all-linear"))
    watch = Watch(trainer.model)
    trainer.train()
    watch.check([2, 6, 10], 10)
    trainer.save_model(str(tmp_path / "adapter"))
    assert_reloads(trainer.model, tmp_path / "adapter", base)


def test_small_updates_count_on_a_4_bit_base(tmp_path: Path) -> None:
    """Updates of 1e-5 to deltas of 0.02 would vanish in bfloat16."""
    model = adapted(quantized_llama(tmp_path), growth="none")
    for delta in deltas_of(model).values():
        delta.values.data.fill_(0.02)
    KINDS["DPO"].build(model, tmp_path, max_steps=20, learning_rate=1e-5, lr_scheduler_type="constant").train()
    moved = torch.cat([delta.values.detach() - 0.02 for delta in deltas_of(model).values()])
    assert moved.abs().median() > 2e-5


class Compare(TrainerCallback):
    """Compares the deltas of a step's optimizer with those that the step began with."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.nonzero = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.before = {name: delta.values.detach().clone() for name, delta in deltas_of(model).items()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for name, delta in deltas_of(model).items():
            assert delta.values.dtype == delta.values.grad.dtype == torch.float32
            assert torch.equal(delta.values, self.before[name])
            self.nonzero += int((delta.values != delta.values.bfloat16()).sum())


@pytest.mark.skipif(
    "use_transformers_continuous_batching" not in GRPOConfig.__dataclass_fields__,
    reason="this version of TRL has no continuous batching",
)
def test_continuous_batching_rounds_no_deltas(tmp_path: Path) -> None:
    """GRPO casts the whole model to bfloat16 at every generation."""
    base = tiny_llama(dtype=torch.bfloat16)
    base.set_attn_implementation("sdpa")
    trainer = KINDS["GRPO"].build(
        base,
        tmp_path,
        config(),
        max_steps=2,
        bf16=True,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={"num_blocks": 16, "max_batch_tokens": 64},
    )
    compare = Compare()
    trainer.add_callback(compare)
    trainer.train()
    assert compare.nonzero > 0
    assert [report.step for report in log_of(trainer.model)] == [2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_run_of_casts_equals_one_without(dtype: torch.dtype, tmp_path: Path) -> None:
    """`model.to(dtype)` before every step, as continuous batching does it; the base has that dtype already."""

    class Cast(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            model.to(dtype)
            assert {delta.values.dtype for delta in deltas_of(model).values()} == {dtype}

    models = []
    for casts in (False, True):
        trainer = KINDS["SFT"].build(tiny_llama(dtype=dtype), tmp_path, config(), bf16=dtype == torch.bfloat16)
        if casts:
            trainer.add_callback(Cast())
        trainer.train()
        models.append(trainer.model)
    assert sum(report.replaced for report in log_of(models[0])[1:]) > 0
    assert_same_run(*models)


def test_reward_model_on_a_half_precision_base(tmp_path: Path) -> None:
    """The score head is trained whole, beside float32 deltas."""
    base = tiny_scorer().to(torch.bfloat16)
    trainer = KINDS["Reward"].build(base, tmp_path, config(task_type="SEQ_CLS"))
    watch = Watch(trainer.model, KINDS["Reward"].loss)
    trainer.train()
    watch.check([2, 6, 10], 10)
