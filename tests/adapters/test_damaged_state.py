"""Damaged training state in an adapter file is refused like any other damage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from support.adapters import assert_unchanged, deltas_of, key_of, read_adapter, snapshot
from torch import Tensor

from .conftest import Saved
from .test_damaged_files import BAD, NUMEL, Tensors, refused, with_entry


def state_edit(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    key = key_of(BAD, f"spiel_{name}")
    return lambda tensors: tensors.update({key: change(tensors[key].clone())})


def without_state(*names: str) -> Callable[[Tensors], None]:
    return lambda tensors: [tensors.pop(key_of(BAD, f"spiel_{name}")) for name in names]


STATE_DAMAGE = {
    "no progress": (without_state("progress"), "progress' is missing"),
    "progress of floats": (state_edit("progress", Tensor.float), "progress' must be five int64 counters"),
    "short progress": (state_edit("progress", lambda t: t[:2]), "progress' must be five int64 counters"),
    "negative step": (state_edit("progress", with_entry(0, -5)), "progress' has a counter out of range"),
    "step zero": (state_edit("progress", with_entry(0, 0)), "progress' has a counter out of range"),
    "unknown freshness": (state_edit("progress", with_entry(2, 7)), "progress' has a counter out of range"),
    "steps without window": (
        without_state("candidates", "candidate_sums", "candidate_squares"),
        "progress' has a counter out of range",
    ),
    "no sums": (without_state("candidate_sums"), "candidate_sums' is missing"),
    "candidates out of range": (state_edit("candidates", with_entry(-1, NUMEL)), "candidates' has a position out"),
    "too many candidates": (
        state_edit("candidates", lambda t: torch.arange(NUMEL, dtype=t.dtype)),
        "candidates' holds 384 positions, more than the 80 deltas",
    ),
    "nan sums": (state_edit("candidate_sums", with_entry(0, float("nan"))), "candidate_sums' has values that are"),
    "short squares": (state_edit("candidate_squares", lambda t: t[:-1]), "candidate_squares' must be floating"),
    "negative squares": (
        state_edit("candidate_squares", with_entry(0, -1.0)),
        "candidate_squares' has negative",
    ),
    "negative rate": (state_edit("max_lr", with_entry(0, -1.0)), "max_lr' has negative values"),
    "negative accumulator": (
        lambda ts: ts.update({key_of(BAD, "spiel_row"): -torch.ones(16), key_of(BAD, "spiel_col"): torch.ones(24)}),
        "row' has negative values",
    ),
    "infinite rate": (state_edit("max_lr", with_entry(0, float("inf"))), "max_lr' has values that are not finite"),
    "row without column": (
        lambda ts: ts.update({key_of(BAD, "spiel_row"): torch.ones(16)}),
        "col' is missing, while the other accumulator is there",
    ),
    "accumulators transposed": (
        lambda ts: ts.update({key_of(BAD, "spiel_row"): torch.ones(24), key_of(BAD, "spiel_col"): torch.ones(16)}),
        r"row' must be floating of shape \(16,\)",
    ),
}


@pytest.mark.parametrize(("edit", "message"), STATE_DAMAGE.values(), ids=STATE_DAMAGE)
def test_damaged_training_state_is_refused(damaged, saved: Saved, edit, message: str) -> None:
    model = PeftModel.from_pretrained(saved.load_base(), saved.adapter, is_trainable=True)
    folder, before = damaged(edit), snapshot(model)
    states = {module: delta.state for module, delta in deltas_of(model).items()}
    with refused(f"spiel_{message}"):
        model.load_adapter(folder, "default", is_trainable=True)
    assert_unchanged(model, before)
    assert all(delta.state is states[module] for module, delta in deltas_of(model).items())
    live = {k.replace(".spiel_delta.", ".spiel_delta.default."): t for k, t in read_adapter(folder).items()}
    with pytest.raises(RuntimeError, match=f"{BAD}.*spiel_"):
        model.load_state_dict(live, strict=False)
    assert deltas_of(model)[BAD].state is states[BAD]
