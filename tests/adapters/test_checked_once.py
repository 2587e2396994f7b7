"""Every tensor of an adapter file is checked exactly once, on every way of loading it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from support.adapters import PREFIX, adapted, deltas_of, read_adapter, snapshot
from support.tensors import same_bits
from torch import Tensor

import spiel_peft.adapter_format
import spiel_peft.delta
from spiel_peft.files.adapter_file import read_adapter as read_whole
from spiel_peft_cli.main import main

from .conftest import Saved


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch, saved: Saved) -> Counter[str]:
    """How often each tensor of the saved adapter was checked, by key: indices, candidates and values."""
    counts: Counter[str] = Counter()
    file = read_adapter(saved.adapter)

    def counting(check: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(tensor: Tensor, *rest: Any) -> Any:
            # Compared by content: loaders rename and copy tensors.
            counts.update([key for key, stored in file.items() if same_bits(stored, tensor.detach())])
            return check(tensor, *rest)

        return wrapper

    for module in (spiel_peft.adapter_format, spiel_peft.delta):
        for name in ("check_index_set", "check_values"):
            monkeypatch.setattr(module, name, counting(getattr(module, name)))
    return counts


def keys(saved: Saved, *names: str) -> Counter[str]:
    return Counter(key for key in read_adapter(saved.adapter) if key.endswith(names))


def live(saved: Saved) -> dict[str, Tensor]:
    tensors = read_adapter(saved.adapter)
    return {key.replace(".spiel_delta.", ".spiel_delta.default."): tensor for key, tensor in tensors.items()}


WITH_STATE: dict[str, Callable[[Saved], object]] = {
    "from_pretrained": lambda s: PeftModel.from_pretrained(s.load_base(), s.adapter, is_trainable=True),
    "from_pretrained, low memory": lambda s: PeftModel.from_pretrained(
        s.load_base(), s.adapter, is_trainable=True, low_cpu_mem_usage=True
    ),
    "load_adapter": lambda s: adapted(s.load_base()).load_adapter(s.adapter, "default", is_trainable=True),
    "set_peft_model_state_dict": lambda s: set_peft_model_state_dict(
        adapted(s.load_base(), regrow_every=4, accumulation_steps=2, total_steps=20), read_adapter(s.adapter)
    ),
    "load_state_dict": lambda s: adapted(
        s.load_base(), regrow_every=4, accumulation_steps=2, total_steps=20
    ).load_state_dict(live(s), strict=False),
}
WITHOUT_STATE: dict[str, Callable[[Saved], object]] = {
    "from_pretrained for inference": lambda s: PeftModel.from_pretrained(s.load_base(), s.adapter),
    "transformers": lambda s: s.load_base().load_adapter(s.adapter),
    "read_adapter": lambda s: read_whole(s.adapter),
    "command line": lambda s: main(["info", str(s.adapter)]),
}


@pytest.mark.parametrize("way", WITH_STATE)
def test_deltas_and_training_state_are_checked_once(saved: Saved, checks: Counter[str], way: str) -> None:
    WITH_STATE[way](saved)
    assert checks == keys(saved, ".indices", ".values", ".spiel_candidates")


@pytest.mark.parametrize("way", WITHOUT_STATE)
def test_deltas_are_checked_once(saved: Saved, checks: Counter[str], way: str) -> None:
    WITHOUT_STATE[way](saved)
    assert checks == keys(saved, ".indices", ".values")


def test_a_tensor_is_checked_again_when_it_is_loaded_again(saved: Saved) -> None:
    """The tensor may have been changed in place since the first load."""
    model = adapted(saved.load_base(), seed=9)
    tensors = {key: tensor for key, tensor in live(saved).items() if key.endswith((".indices", ".values"))}
    model.load_state_dict(tensors, strict=False)
    module = next(iter(deltas_of(model)))
    tensors[f"{PREFIX}{module}.spiel_delta.default.values"][0] = float("nan")
    before = snapshot(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"{module}.*has values that are not finite"):
            model.load_state_dict(tensors, strict=False)
        assert all(same_bits(tensor, model.state_dict()[key]) for key, tensor in before.items())


def test_a_refused_load_leaves_no_tensor_marked_as_sound(saved: Saved) -> None:
    model = adapted(saved.load_base(), seed=9)
    tensors = {key: tensor for key, tensor in live(saved).items() if key.endswith((".indices", ".values"))}
    first, second = list(deltas_of(model))[:2]
    bad, later = (tensors[f"{PREFIX}{module}.spiel_delta.default.values"] for module in (first, second))
    kept = bad[0].clone()
    bad[0] = float("nan")
    with pytest.raises(RuntimeError, match=f"{first}.*has values that are not finite"):
        model.load_state_dict(tensors, strict=False)
    bad[0], later[0] = kept, float("inf")
    with pytest.raises(RuntimeError, match=f"{second}.*has values that are not finite"):
        model.load_state_dict(tensors, strict=False)
    assert all(bool(torch.isfinite(delta.values).all()) for delta in deltas_of(model).values())
