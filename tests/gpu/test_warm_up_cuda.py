"""What `warm_up` compiles is what a run on a GPU launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from spiel_peft import SM3, SpIELConfig, warm_up

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("growth", ["accumulated_gradient", "momentum"])
def test_a_run_compiles_nothing_more(growth: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    base = nn.Sequential(nn.Linear(512, 768), nn.GELU(), nn.Linear(768, 256)).to("cuda", dtype)
    config = SpIELConfig(
        target_modules=["0", "2"], density=0.02, growth=growth, regrow_every=3, accumulation_steps=2, total_steps=100
    )
    model = get_peft_model(base, config).train()
    assert warm_up(model) > 8
    compiled: list[str] = []

    def note(*, repr: str, **_: Any) -> None:
        compiled.append(repr)

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = SM3(parameters, lr=1e-2) if growth == "momentum" else torch.optim.AdamW(parameters, lr=1e-2)
    for tokens in (64, 64, 64, 64, 64, 64, 48, 7, 64):
        model(torch.randn(tokens, 512, device="cuda", dtype=dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert compiled == []
