"""A run compiles nothing anew once its second cycle is over: counts that change between closes are not specialized on.

Training runs in Triton's interpreter, and the JIT is asked at every launch what it would look up.
"""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from support.quantized import COLS, linear_4bit
from torch import nn

from spiel_kernels import outer_plan
from spiel_kernels.dispatch import use_backend
from spiel_peft import SM3, SpIELConfig

from .compiler import launches

REGROW_EVERY, WINDOW = 3, 2
SECOND_CYCLE = WINDOW + REGROW_EVERY  # the step of the second close
# In each step. The last batch of an epoch is smaller.
TOKENS = (*[16] * SECOND_CYCLE, 16, 1, 16, 7, 16, 33)


def keys_by_step(growth: str) -> tuple[list[set[tuple[str, str]]], list[launches.Launch]]:
    """What the JIT looks up in each step of a small run, and all launches."""
    base = nn.Sequential(linear_4bit(rows=80), nn.GELU(), nn.Linear(80, 8))
    config = SpIELConfig(
        target_modules=["0", "2"],
        density=0.02,
        growth=growth,
        regrow_every=REGROW_EVERY,
        accumulation_steps=WINDOW,
        total_steps=100,
    )
    steps = []
    with use_backend("triton"), launches.recorded(90) as found:
        model = get_peft_model(base, config).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = SM3(parameters, lr=1e-2) if growth == "momentum" else torch.optim.AdamW(parameters, lr=1e-2)
        for tokens in TOKENS:
            before = len(found)
            model(torch.randn(tokens, COLS)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append({(launch.name, launch.key) for launch in found[before:]})
    return steps, found


@pytest.mark.parametrize(
    "growth, method",
    [("accumulated_gradient", "compact"), ("accumulated_gradient", "entries"), ("momentum", "compact")],
)
def test_nothing_new_after_the_second_cycle(growth: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outer_plan, "choose_method", lambda *_: method)
    steps, found = keys_by_step(growth)
    known = set().union(*steps[:SECOND_CYCLE])
    names = {launch.name for launch in found}
    gather = "pick_entries_kernel" if method == "compact" else "entry_dots_kernel"
    assert {"_fold_4bit_kernel", "token_major_kernel", gather} <= names
    assert ("_append_kernel" in names) == (growth == "accumulated_gradient")
    assert [sorted(step - known) for step in steps[SECOND_CYCLE:]] == [[]] * len(steps[SECOND_CYCLE:])
