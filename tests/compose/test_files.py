"""Adapters combined from files, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.adapters import spiel_config
from support.models import logits, tiny_llama

from spiel_peft import SpIELConfig, combine_adapters
from spiel_peft.files.adapter_file import AdapterFile, StoredDelta, read_adapter, write_adapter

from .helpers import LANGUAGE, TASK, two_adapters


def saved(folder: Path) -> tuple[Any, list[AdapterFile]]:
    model = two_adapters()
    model.save_pretrained(folder)
    return model, [read_adapter(folder / name) for name in (LANGUAGE, TASK)]


@pytest.mark.parametrize(
    "rule",
    [{}, {"combination_type": "ties", "density": 0.5}, {"combination_type": "dare_ties", "density": 0.3, "seed": 4}],
)
def test_files_combine_to_what_the_model_gives(rule: dict[str, Any], tmp_path: Path) -> None:
    model, files = saved(tmp_path)
    done: list[tuple[int, int, str]] = []
    result = combine_adapters(files, [1.0, -0.5], progress=lambda *at: done.append(at), **rule)
    write_adapter(result, tmp_path / "mix")
    model.add_weighted_adapter([LANGUAGE, TASK], [1.0, -0.5], "mix", **rule)
    model.set_adapter("mix")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "mix")
    assert torch.equal(logits(loaded), logits(model))
    modules = dict.fromkeys(name for file in files for name in file.deltas)
    assert done == [(i, len(modules), name) for i, name in enumerate(modules, start=1)]


def test_what_is_saved_in_full_is_taken_over_and_cannot_clash(tmp_path: Path) -> None:
    for name, extra in (("plain", {}), ("full", {"modules_to_save": ["lm_head"]})):
        get_peft_model(tiny_llama(), spiel_config(**extra)).save_pretrained(tmp_path / name)
    plain, full = (read_adapter(tmp_path / name) for name in ("plain", "full"))
    result = combine_adapters([plain, full], [1.0, 2.0])
    assert result.config.modules_to_save == ["lm_head"]
    assert torch.equal(result.others["lm_head.weight"], full.others["lm_head.weight"])
    with pytest.raises(ValueError, match="'a' and 'b' cannot be combined: both have trained 'lm_head.weight' in full"):
        combine_adapters([full, full], [1.0, 1.0], names=["a", "b"])


def stored(**fields: Any) -> AdapterFile:
    delta = StoredDelta(torch.tensor([1, 4], dtype=torch.int32), torch.tensor([1.0, -1.0]))
    return AdapterFile(SpIELConfig(num_deltas={"lin": 2}, **fields), {"lin": delta})


def test_other_bases_biases_and_numbers_are_refused() -> None:
    one, other = stored(base_model_name_or_path="org/one"), stored(base_model_name_or_path="org/other")
    with pytest.raises(ValueError, match="base_model_name_or_path differs.*'1': 'org/one', '2': 'org/other'"):
        combine_adapters([one, other], [1.0, 1.0])
    assert combine_adapters([one, other], [1.0, 1.0], check_base=False).deltas["lin"].values.tolist() == [2.0, -2.0]
    assert combine_adapters([one, stored()], [1.0, 1.0]).config.base_model_name_or_path == "org/one"
    with pytest.raises(ValueError, match="Adapter 'b' was trained with bias='all'"):
        combine_adapters([one, stored(bias="all")], [1.0, 1.0], names=["a", "b"])
    with pytest.raises(ValueError, match="each has trained tokens in full"):
        combine_adapters([stored(trainable_token_indices=[1]), stored(trainable_token_indices=[2])], [1.0, 1.0])
    with pytest.raises(ValueError, match="weights has 1 entries for 2 adapters"):
        combine_adapters([one, other], [1.0])
    with pytest.raises(ValueError, match="adapters is empty"):
        combine_adapters([], [])
    with pytest.raises(ValueError, match="names must be 2 distinct names"):
        combine_adapters([one, other], [1.0, 1.0], names=["a", "a"])


def test_what_is_left_decides_the_counts() -> None:
    one = stored()
    one.deltas["more"] = StoredDelta(torch.tensor([0], dtype=torch.int32), torch.tensor([3.0]))
    result = combine_adapters([one, stored()], [1.0, -1.0], drop_zeros=True)
    assert set(result.deltas) == {"more"} and result.config.num_deltas == {"more": 1}
    with pytest.raises(ValueError, match="nothing is left of these adapters"):
        combine_adapters([stored(), stored()], [1.0, -1.0], drop_zeros=True)
