"""The overlap of adapters, compared with counts by Python sets."""

from __future__ import annotations

import pytest
import torch
from support.adapters import adapted, deltas_of, spiel_config
from support.models import tiny_llama
from torch import Tensor

from spiel_peft import SpIELConfig, overlap, overlap_of_files
from spiel_peft.compose.overlap import Overlap, overlap_of_pairs
from spiel_peft.files.adapter_file import AdapterFile, StoredDelta

from .helpers import LANGUAGE, TASK, two_adapters


def pair(entries: dict[int, float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(list(entries), dtype=torch.int32), torch.tensor(list(entries.values()))


def test_counts_by_hand() -> None:
    report = overlap_of_pairs(
        {
            "a": {"x": pair({1: 1.0, 2: -1.0, 5: 0.0}), "only": pair({3: 1.0})},
            "b": {"x": pair({2: 1.0, 5: 2.0, 9: 1.0})},
            "c": {"x": pair({2: 1.0, 9: -0.5})},
        }
    )
    assert report.modules == {"x": Overlap((3, 3, 2), 1, 4, 2), "only": Overlap((1, 0, 0), 0, 1, 0)}
    assert report.total == Overlap((4, 3, 2), 1, 5, 2) and report.total.fraction == 0.2
    assert report.pairs == {
        ("a", "b"): Overlap((4, 3), 2, 5, 1),
        ("a", "c"): Overlap((4, 2), 1, 5, 1),
        ("b", "c"): Overlap((3, 2), 2, 3, 1),
    }
    assert str(report) == "deltas: a 4, b 3, c 2; 1 of 5 positions shared (20.0%), 2 with opposite signs"


def test_a_model_and_the_files_of_its_adapters_agree_with_sets() -> None:
    model = two_adapters()
    report = overlap(model, [LANGUAGE, TASK])
    held = [deltas_of(model, name) for name in (LANGUAGE, TASK)]
    for module, counts in report.modules.items():
        a, b = (set(each[module].indices.tolist()) if module in each else set() for each in held)
        assert (counts.shared, counts.union, counts.sizes) == (len(a & b), len(a | b), (len(a), len(b)))
    assert report.total.shared > 0 and report.pairs == {(LANGUAGE, TASK): report.total}
    files = {
        name: AdapterFile(SpIELConfig(), {m: StoredDelta(d.indices, d.values.detach()) for m, d in each.items()})
        for name, each in zip((LANGUAGE, TASK), held, strict=True)
    }
    assert overlap_of_files(files) == report
    assert model.add_weighted_adapter([LANGUAGE, TASK], [1.0, 1.0], "both") == report
    assert {m: d.k for m, d in deltas_of(model, "both").items()} == {m: c.union for m, c in report.modules.items()}


def test_one_adapter_overlaps_with_itself_and_tied_modules_count_once() -> None:
    model = adapted(tiny_llama(tied=True), target_modules=["embed_tokens"], ensure_weight_tying=True, density=0.1)
    report = overlap(model, ["default"])
    assert report.pairs == {} and report.total == Overlap((64,), 64, 64, 0) and report.total.fraction == 1


def test_wrong_names_are_refused() -> None:
    model = adapted()
    model.add_adapter("other", spiel_config(seed=2))
    with pytest.raises(ValueError, match=r"Adapters \['gone'\] do not exist"):
        overlap(model, ["default", "gone"])
    with pytest.raises(ValueError, match="more than once"):
        overlap(model, ["other", "other"])
    with pytest.raises(ValueError, match="adapters is empty"):
        overlap_of_files({})
    assert overlap_of_pairs({"a": {}, "b": {}}).total.fraction == 0
