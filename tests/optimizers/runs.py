"""Short runs with a close in the middle and one at the end."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from support.adapters import log_of, trainable
from support.runs import adapt, train

from optimizers.catalogue import EVERY, SHARED

STEPS = 7
GROWTHS = ["accumulated_gradient", "momentum"]


def fresh(growth: str = "accumulated_gradient", **fields: Any) -> PeftModel:
    settings = {"accumulation_steps": 3, "density": 0.3, "total_steps": 20, "initial_regrow_rate": 0.8}
    return adapt(growth=growth, **{**settings, **fields})


def plain_run(name: str, growth: str = "accumulated_gradient") -> PeftModel:
    model = fresh(growth)
    train(model, {**EVERY, **SHARED}[name](trainable(model)), STEPS)
    assert [report.step for report in log_of(model)] == [3, 7]
    assert log_of(model)[1].replaced > 0
    return model
