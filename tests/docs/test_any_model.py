"""The code on docs/any-model.md runs."""

from __future__ import annotations

from typing import Any

from support.docs_blocks import code_blocks, page

from spiel_peft import SpIELParameter
from spiel_peft.delta import SparseDelta


def test_code_of_the_page_runs() -> None:
    names: dict[str, Any] = {}
    experts, diffusers, beside = code_blocks(page("any-model.md"))
    exec(experts, names)
    assert sum(isinstance(module, SpIELParameter) for module in names["model"].modules()) == 4
    exec(diffusers, names)
    scales = {delta.scale for delta in names["unet"].modules() if isinstance(delta, SparseDelta)}
    assert scales == {0.5}
    exec(beside, names)
    kinds = {n.split(".")[-3] for n, p in names["model"].named_parameters() if p.requires_grad}
    assert kinds == {"spiel_delta", "lora_A", "lora_B"}
