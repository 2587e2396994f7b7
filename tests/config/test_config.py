"""`SpIELConfig`: defaults, every refusal, and the round trips PEFT and users put a config through."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import pickle
import re
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftType, get_peft_config
from peft.tuners.tuners_utils import check_target_module_exists

from spiel_peft import growth
from spiel_peft.config import LORA_ONLY_FIELDS, SpIELConfig
from spiel_peft.growth import (
    GrowthCriterion,
    GrowthRequest,
    get_growth_criterion,
    growth_criteria,
    register_growth_criterion,
)

NAN, INF = float("nan"), float("inf")


def refuses(*parts: str) -> Any:
    """Expect a ValueError whose message holds all `parts`, in this order."""
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


def json_round_trip(config: SpIELConfig, folder: Path) -> PeftConfig:
    config.save_pretrained(str(folder))
    return PeftConfig.from_pretrained(str(folder))


@pytest.fixture
def registry() -> Iterator[None]:
    """Undo the registrations of a test."""
    growth_criteria()
    before = dict(growth._CRITERIA)
    yield
    growth._CRITERIA.clear()
    growth._CRITERIA.update(before)


# --- defaults and accepted values ---


def test_defaults_are_those_of_the_design() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = SpIELConfig()
    own = {f.name for f in dataclasses.fields(SpIELConfig)} - {f.name for f in dataclasses.fields(PeftConfig)}
    assert {name: getattr(config, name) for name in own} == {
        "r": 8,
        "density": None,
        "num_deltas": None,
        "rank_pattern": {},
        "density_pattern": {},
        "growth": "accumulated_gradient",
        "regrow_every": 20,
        "accumulation_steps": 5,
        "candidates": None,
        "initial_regrow_rate": 0.2,
        "regrow_schedule": "linear",
        "total_steps": None,
        "stop_regrowing_at": 1.0,
        "seed": 0,
        "target_modules": None,
        "exclude_modules": None,
        "target_parameters": [],
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "trainable_token_indices": None,
        "ensure_weight_tying": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_weights": True,
        "delta_dtype": None,
    }


def test_every_field_has_help_and_stands_in_the_docstring() -> None:
    inherited = {f.name for f in dataclasses.fields(PeftConfig)}
    for field in dataclasses.fields(SpIELConfig):
        assert field.metadata["help"]
        if field.name not in inherited:
            assert f"\n        {field.name} (" in SpIELConfig.__doc__


def test_peft_type_is_the_enum_member_whatever_was_passed() -> None:
    for config in (SpIELConfig(), SpIELConfig(peft_type="LORA"), SpIELConfig(peft_type=PeftType.LORA)):
        assert isinstance(config.peft_type, PeftType)
        assert config.peft_type is PeftType("SPIEL")


def test_attributes_peft_looks_for_exist_but_are_not_saved() -> None:
    config = SpIELConfig()
    names = ("modules_to_tie", "target_modules_to_tie", "_from_checkpoint")
    assert [getattr(config, name) for name in names] == [None, None, False]
    assert not set(names) & set(config.to_dict())


def test_peft_can_match_modules_without_target_modules() -> None:
    assert not check_target_module_exists(SpIELConfig(), "layers.0.q_proj")


@pytest.mark.parametrize(
    "given, kept",
    [
        ({}, {"r": 8, "density": None, "num_deltas": None}),
        ({"r": 64}, {"r": 64, "density": None, "num_deltas": None}),
        ({"density": 0.01}, {"r": None, "density": 0.01, "num_deltas": None}),
        ({"density": 1}, {"r": None, "density": 1.0, "num_deltas": None}),
        ({"num_deltas": 1000}, {"r": None, "density": None, "num_deltas": 1000}),
        ({"num_deltas": {"a.b": 3}}, {"r": None, "density": None, "num_deltas": {"a.b": 3}}),
        ({"r": None, "density": 0.5}, {"r": None, "density": 0.5, "num_deltas": None}),
    ],
    ids=str,
)
def test_one_budget_is_kept_and_r_is_the_default(given: dict[str, Any], kept: dict[str, Any]) -> None:
    config = SpIELConfig(**given)
    assert {name: getattr(config, name) for name in kept} == kept


def test_numbers_of_other_libraries_become_plain_ones_that_json_can_hold(tmp_path: Path) -> None:
    config = SpIELConfig(
        num_deltas={"a": np.int64(3)},
        density_pattern={"a": np.float32(0.5)},
        rank_pattern={"b": np.int32(2)},
        seed=np.uint8(7),
        initial_regrow_rate=Fraction(1, 4),
        trainable_token_indices=list(np.arange(2)),
    )
    assert type(config.num_deltas["a"]) is type(config.rank_pattern["b"]) is type(config.seed) is int
    assert type(config.density_pattern["a"]) is type(config.initial_regrow_rate) is float
    assert json_round_trip(config, tmp_path) == config


@pytest.mark.parametrize("rate", [0, 0.0, 1, 1.0, 0.5])
def test_bounds_of_fractions_are_allowed(rate: float) -> None:
    config = SpIELConfig(initial_regrow_rate=rate, stop_regrowing_at=rate)
    assert config.initial_regrow_rate == config.stop_regrowing_at == rate


@pytest.mark.parametrize("collection", [list, tuple, set, frozenset])
def test_collections_of_module_names_become_sets(collection: type) -> None:
    config = SpIELConfig(target_modules=collection(["q", "v"]), exclude_modules=collection(["x"]))
    assert config.target_modules == {"q", "v"} and type(config.target_modules) is set
    assert config.exclude_modules == {"x"} and type(config.exclude_modules) is set


@pytest.mark.parametrize("target", ["all-linear", r".*\.(q|v)_proj", "lin0"])
def test_strings_as_targets_stay_strings(target: str) -> None:
    assert SpIELConfig(target_modules=target, exclude_modules=target).target_modules == target


def test_modules_to_save_is_a_list_that_peft_can_extend() -> None:
    """PEFT calls `.extend` on it for classification heads."""
    given = ["score"]
    assert SpIELConfig(modules_to_save=("a", "b")).modules_to_save == ["a", "b"]
    assert SpIELConfig(modules_to_save={"b", "a"}).modules_to_save == ["a", "b"]
    SpIELConfig(modules_to_save=given).modules_to_save.append("classifier")
    assert given == ["score"]


def test_layers_may_be_one_index_or_several() -> None:
    assert SpIELConfig(target_modules=["q"], layers_to_transform=3).layers_to_transform == 3
    config = SpIELConfig(target_modules=["q"], layers_to_transform=range(2), layers_pattern="h")
    assert (config.layers_to_transform, config.layers_pattern) == ([0, 1], "h")


def test_layers_to_transform_selects_layers_as_peft_does() -> None:
    config = SpIELConfig(target_modules=["q"], layers_to_transform=[1], layers_pattern=["h"])
    assert check_target_module_exists(config, "model.h.1.q")
    assert not check_target_module_exists(config, "model.h.0.q")


def test_two_configs_do_not_share_dicts_with_each_other_or_the_caller() -> None:
    pattern = {"q": 2}
    first, second = SpIELConfig(rank_pattern=pattern), SpIELConfig(rank_pattern=pattern)
    first.rank_pattern["v"] = 3
    assert pattern == second.rank_pattern == {"q": 2}
    assert SpIELConfig(rank_pattern=None, density_pattern=None).rank_pattern == {}


# --- refusals: the message names field, rule, value and remedy ---


@pytest.mark.parametrize("value", [0, -1, 8.0, 0.5, "8", True, False, NAN, [8], {"q": 8}], ids=repr)
def test_r_is_a_positive_integer(value: Any) -> None:
    with refuses("`r` must be an integer of at least 1", f"got {value!r}", "such as 8"):
        SpIELConfig(r=value)


@pytest.mark.parametrize(
    "value", [0, 0.0, -0.1, 1.0001, 2, NAN, INF, -INF, "0.1", True, False, [0.1], {}, 1j, 10**400], ids=repr
)
def test_density_is_a_number_above_zero_and_at_most_one(value: Any) -> None:
    with refuses("`density` must be a number above 0 and at most 1", f"got {value!r}"[:200], "0.01 trains 1%"):
        SpIELConfig(density=value)


@pytest.mark.parametrize("value", [0, -5, 10.0, "10", True, NAN, [1], ("a", 1)], ids=repr)
def test_num_deltas_is_a_positive_integer_or_a_dict(value: Any) -> None:
    with refuses("`num_deltas` must be an integer of at least 1", f"got {value!r}", "dict from full module"):
        SpIELConfig(num_deltas=value)


@pytest.mark.parametrize("count", [0, -1, 1.5, "3", True, None, NAN], ids=repr)
def test_num_deltas_counts_are_positive_integers(count: Any) -> None:
    with refuses("`num_deltas['a.b']` must be an integer of at least 1", f"got {count!r}"):
        SpIELConfig(num_deltas={"ok": 1, "a.b": count})


@pytest.mark.parametrize("key", [0, "", None, ("a",)], ids=repr)
def test_num_deltas_keys_are_module_names(key: Any) -> None:
    with refuses("`num_deltas` must have non-empty strings as keys", f"got {key!r}"):
        SpIELConfig(num_deltas={key: 1})


def test_num_deltas_dict_is_not_empty() -> None:
    with refuses("`num_deltas` must name at least one module", "got {}"):
        SpIELConfig(num_deltas={})


@pytest.mark.parametrize(
    "budgets, shown",
    [
        ({"r": 4, "density": 0.1}, ["`r=4`", "`density=0.1`"]),
        ({"r": 8, "num_deltas": 10}, ["`r=8`", "`num_deltas=10`"]),
        ({"density": 0.1, "num_deltas": {"a": 1}}, ["`density=0.1`", "`num_deltas={'a': 1}`"]),
        ({"r": 4, "density": 0.1, "num_deltas": 9}, ["`r=4`", "`density=0.1`", "`num_deltas=9`"]),
        ({"r": 0, "density": NAN}, ["`r=0`", "`density=nan`"]),
    ],
    ids=str,
)
def test_two_budgets_are_refused_by_name(budgets: dict[str, Any], shown: list[str]) -> None:
    with refuses("give exactly one", *shown, "Drop one of them"):
        SpIELConfig(**budgets)


def test_replacing_a_budget_means_dropping_the_default_one() -> None:
    config = SpIELConfig()
    with refuses("`r=8`", "`density=0.1`", "`r=None`"):
        dataclasses.replace(config, density=0.1)
    assert dataclasses.replace(config, r=None, density=0.1).density == 0.1


@pytest.mark.parametrize("field", ["rank_pattern", "density_pattern"])
@pytest.mark.parametrize("value", [5, "q", ["q"], [], "", 0, False], ids=repr)
def test_patterns_are_dicts(field: str, value: Any) -> None:
    with refuses(f"`{field}` must be a dict", f"got {value!r}", "as in {'q_proj': VALUE}"):
        SpIELConfig(**{field: value})


@pytest.mark.parametrize("field", ["rank_pattern", "density_pattern"])
def test_pattern_keys_are_regular_expressions(field: str) -> None:
    for key in (1, "", None):
        with refuses(f"`{field}` must have non-empty strings as keys", f"got {key!r}"):
            SpIELConfig(**{field: {key: 1}})
    with refuses(f"`{field}` must be a valid regular expression", "got '(q'", "Escape"):
        SpIELConfig(**{field: {"(q": 1}})
    assert getattr(SpIELConfig(**{field: {r"^model\.h\.0\.(q|v)": 1}}), field) == {r"^model\.h\.0\.(q|v)": 1}


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, NAN, None], ids=repr)
def test_rank_pattern_values_are_checked_like_r(value: Any) -> None:
    with refuses("`rank_pattern['q']` must be an integer of at least 1", f"got {value!r}"):
        SpIELConfig(rank_pattern={"q": value})


@pytest.mark.parametrize("value", [0, -1, 1.5, "0.2", True, NAN, None], ids=repr)
def test_density_pattern_values_are_checked_like_density(value: Any) -> None:
    with refuses("`density_pattern['q']` must be a number above 0 and at most 1", f"got {value!r}"):
        SpIELConfig(density_pattern={"q": value})


def test_one_pattern_in_both_dicts_is_refused() -> None:
    with refuses("`rank_pattern` must not share a key with `density_pattern`", "['q']", "Keep each pattern"):
        SpIELConfig(rank_pattern={"q": 2, "v": 2}, density_pattern={"q": 0.1, "k": 0.1})


@pytest.mark.parametrize("value", ["gradient", "", "Random", None, 3, True, ["random"]], ids=repr)
def test_growth_is_a_registered_criterion(value: Any) -> None:
    known = "['accumulated_gradient', 'momentum', 'random', 'none'"
    with refuses("`growth` must be a registered", f"got {value!r}", known, "register_growth_criterion"):
        SpIELConfig(growth=value)


@pytest.mark.parametrize("field", ["regrow_every", "accumulation_steps", "total_steps"])
@pytest.mark.parametrize("value", [0, -20, 20.0, "20", True, NAN, INF, [20]], ids=repr)
def test_steps_are_positive_integers(field: str, value: Any) -> None:
    with refuses(f"`{field}` must be an integer of at least 1", f"got {value!r}", "optimizer steps"):
        SpIELConfig(**{field: value})


@pytest.mark.parametrize("field", ["regrow_every", "accumulation_steps", "seed", "bias", "growth"])
def test_only_optional_fields_take_none(field: str) -> None:
    with refuses(f"`{field}` must be", "got None"):
        SpIELConfig(**{field: None})


def test_windows_that_gather_must_not_overlap() -> None:
    message = ("`accumulation_steps` must be at most `regrow_every` (20)", "'accumulated_gradient'", "got 21")
    with refuses(*message, "Lower `accumulation_steps` or raise `regrow_every`"):
        SpIELConfig(accumulation_steps=21)
    assert SpIELConfig(accumulation_steps=20).accumulation_steps == 20


@pytest.mark.parametrize("growth", ["momentum", "random", "none"])
def test_other_criteria_may_close_first_after_more_than_one_period(growth: str) -> None:
    assert SpIELConfig(growth=growth, accumulation_steps=50).accumulation_steps == 50


@pytest.mark.parametrize("value", [0, 0.99, -2, True, "2", NAN, INF, [2]], ids=repr)
def test_candidates_are_a_multiple_of_at_least_one(value: Any) -> None:
    with refuses("`candidates` must be a number of at least 1", f"got {value!r}", "None takes as many as deltas"):
        SpIELConfig(candidates=value)


def test_candidates_become_a_float() -> None:
    assert [repr(SpIELConfig(candidates=value).candidates) for value in (1, np.float32(2.5))] == ["1.0", "2.5"]


@pytest.mark.parametrize("growth", ["momentum", "random", "none"])
def test_candidates_need_a_criterion_that_gathers(growth: str) -> None:
    with refuses("`candidates` works only with a growth criterion that gathers", f"{growth!r}", "got 2.0", "Drop"):
        SpIELConfig(growth=growth, candidates=2)
    assert SpIELConfig(growth=growth).candidates is None


@pytest.mark.parametrize("field", ["initial_regrow_rate", "stop_regrowing_at"])
@pytest.mark.parametrize("value", [-0.01, 1.01, 2, NAN, INF, -INF, "0.5", None, True, [0.1]], ids=repr)
def test_rates_lie_between_zero_and_one(field: str, value: Any) -> None:
    with refuses(f"`{field}` must be a number from 0 to 1", f"got {value!r}", "It is a"):
        SpIELConfig(**{field: value})


@pytest.mark.parametrize("value", [-1, 0.0, "0", True, NAN], ids=repr)
def test_seed_is_a_non_negative_integer(value: Any) -> None:
    with refuses("`seed` must be an integer of at least 0", f"got {value!r}", "such as 0"):
        SpIELConfig(seed=value)


@pytest.mark.parametrize(
    "field, choices",
    [
        ("regrow_schedule", "'linear', 'cosine', 'constant'"),
        ("bias", "'none', 'all', 'spiel_only'"),
        ("delta_dtype", "None, 'float32', 'bfloat16', 'float16'"),
    ],
)
@pytest.mark.parametrize("value", ["exponential", "lora_only", "", "Linear", 3, True, ["all"]], ids=repr)
def test_choices_are_listed(field: str, choices: str, value: Any) -> None:
    with refuses(f"`{field}` must be one of {choices}", f"got {value!r}"):
        SpIELConfig(**{field: value})


@pytest.mark.parametrize("value", ["float64", "fp32", "int8", torch.float32, "torch.bfloat16"], ids=repr)
def test_delta_dtype_is_one_of_three_names(value: Any) -> None:
    with refuses("`delta_dtype`", f"got {value!r}", "as a string"):
        SpIELConfig(delta_dtype=value)


@pytest.mark.parametrize(
    "field, value",
    [("regrow_schedule", v) for v in ("linear", "cosine", "constant")]
    + [("bias", v) for v in ("none", "all", "spiel_only")]
    + [("delta_dtype", v) for v in (None, "float32", "bfloat16", "float16")],
)
def test_every_listed_choice_is_accepted(field: str, value: str | None) -> None:
    assert getattr(SpIELConfig(**{field: value}), field) == value


@pytest.mark.parametrize("field", ["ensure_weight_tying", "fan_in_fan_out", "init_weights"])
@pytest.mark.parametrize("value", [None, 0, 1, "true", "gaussian", []], ids=repr)
def test_switches_are_bools(field: str, value: Any) -> None:
    with refuses(f"`{field}` must be True or False", f"got {value!r}"):
        SpIELConfig(**{field: value})


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_module_selections_are_names_or_a_regex(field: str) -> None:
    for value in (3, True, {"q": 1}):
        with refuses(f"`{field}` must be a list of names", f"got {value!r}", "or None"):
            SpIELConfig(**{field: value})
    for item in (1, "", None):
        with refuses(f"`{field}` must hold non-empty strings only", f"got {item!r}"):
            SpIELConfig(**{field: ["q", item]})
    with refuses(f"`{field}` must not be an empty string", "got ''"):
        SpIELConfig(**{field: ""})
    with refuses(f"`{field}` must be a valid regular expression", "got '*q'", "Escape"):
        SpIELConfig(**{field: "*q"})


@pytest.mark.parametrize("field, value", [("layers_to_transform", [0]), ("layers_pattern", "h")])
@pytest.mark.parametrize("target", ["all-linear", ".*q"])
def test_layers_need_a_list_of_targets(field: str, value: Any, target: str) -> None:
    with refuses(f"`{field}` cannot be used when `target_modules` is a str", f"got {value!r}", "Drop"):
        SpIELConfig(target_modules=target, **{field: value})


def test_layers_pattern_needs_layers_to_transform() -> None:
    with refuses("`layers_pattern` works only with `layers_to_transform`", "got 'h'", "or drop"):
        SpIELConfig(target_modules=["q"], layers_pattern="h")


def test_layers_cannot_narrow_a_dict_of_modules() -> None:
    with refuses("`layers_to_transform` cannot be used when `num_deltas` is a dict", "got [0]", "Drop"):
        SpIELConfig(num_deltas={"h.0.q": 5}, layers_to_transform=[0])


@pytest.mark.parametrize("value", [-1, 1.0, "0", True, NAN], ids=repr)
def test_layers_are_non_negative_integers(value: Any) -> None:
    for given in (value, [0, value]):
        with refuses("`layers_to_transform` must be an integer of at least 0", f"got {value!r}"):
            SpIELConfig(target_modules=["q"], layers_to_transform=given)


@pytest.mark.parametrize("value", [3, [1], [""]], ids=repr)
def test_layers_pattern_is_made_of_names(value: Any) -> None:
    with refuses("`layers_pattern` must", "got", "such as 'layers' or 'h'"):
        SpIELConfig(target_modules=["q"], layers_to_transform=0, layers_pattern=value)


def test_modules_to_save_is_a_list_not_a_string() -> None:
    """PEFT would take a string for a list of its letters and match nearly everything."""
    with refuses("`modules_to_save` must be a list of names", "got 'score'", "['classifier']"):
        SpIELConfig(modules_to_save="score")
    with refuses("`modules_to_save` must hold non-empty strings only", "got 3"):
        SpIELConfig(modules_to_save=["score", 3])


def test_trainable_token_indices_are_token_ids() -> None:
    assert SpIELConfig(trainable_token_indices=[0, 5]).trainable_token_indices == [0, 5]
    assert SpIELConfig(trainable_token_indices={"emb": (1,)}).trainable_token_indices == {"emb": [1]}
    with refuses("`trainable_token_indices` must be a list of integers", "got 'a'"):
        SpIELConfig(trainable_token_indices="a")
    with refuses("`trainable_token_indices` must be an integer of at least 0", "got -1"):
        SpIELConfig(trainable_token_indices=[0, -1])
    with refuses("`trainable_token_indices['emb']` must be a list of integers", "got 4"):
        SpIELConfig(trainable_token_indices={"emb": 4})
    with refuses("`trainable_token_indices` must have non-empty strings as keys", "got 7"):
        SpIELConfig(trainable_token_indices={7: [0]})


def test_a_huge_wrong_value_does_not_fill_the_screen() -> None:
    with pytest.raises(ValueError) as caught:
        SpIELConfig(modules_to_save="x" * 10_000)
    assert len(str(caught.value)) < 500


# --- num_deltas as a dict selects the targets ---


def test_num_deltas_dict_selects_the_targets() -> None:
    counts = {"h.0.q": 5, "h.1.q": 6}
    assert SpIELConfig(num_deltas=counts).target_modules == set(counts)
    assert SpIELConfig(num_deltas=counts, target_modules=list(counts)).target_modules == set(counts)


def test_suffixes_that_peft_made_of_the_names_are_the_same_targets() -> None:
    """PEFT replaces 20 or more target names by suffixes in the config it saves."""
    counts = {f"h.{layer}.q": 5 for layer in range(30)}
    assert SpIELConfig(num_deltas=counts, target_modules=["q"]).target_modules == set(counts)


@pytest.mark.parametrize(
    "targets, difference",
    [
        (["h.0.q", "h.0.v"], "('h.0.v' only in `target_modules`)"),
        (["h.1.q"], "('h.1.q' only in `target_modules`; 'h.0.q' only in `num_deltas`)"),
        ([], "('h.0.q' only in `num_deltas`)"),
        (["0.q", "v"], "('v' only in `target_modules`)"),
        ("all-linear", ""),
        ("h.0.q", ""),
    ],
    ids=str,
)
def test_targets_beside_a_dict_must_be_its_keys(targets: Any, difference: str) -> None:
    with refuses("`target_modules` must name the keys of `num_deltas`", difference, "got", "Leave"):
        SpIELConfig(num_deltas={"h.0.q": 5}, target_modules=targets)


# --- fields of LoraConfig ---


def test_all_lora_only_fields_are_known() -> None:
    lora = {f.name for f in dataclasses.fields(LoraConfig)}
    own = {f.name for f in dataclasses.fields(SpIELConfig)}
    assert lora - own == set(LORA_ONLY_FIELDS)


@pytest.mark.parametrize("field", sorted(LORA_ONLY_FIELDS))
def test_lora_only_fields_say_what_to_do_instead(field: str) -> None:
    with refuses(f"`{field}` is a field of LoraConfig", "SpIELConfig", "got 16", LORA_ONLY_FIELDS[field]):
        SpIELConfig(**{field: 16})
    assert "rop it" in LORA_ONLY_FIELDS[field]


def test_all_lora_only_fields_are_reported_at_once() -> None:
    with refuses("`lora_alpha`", "got 16", "\n", "`lora_dropout`", "got 0.05"):
        SpIELConfig(r=8, lora_alpha=16, lora_dropout=0.05)


def test_a_subclass_refuses_lora_fields_but_may_define_one() -> None:
    @dataclasses.dataclass
    class Variant(SpIELConfig):
        lora_alpha: int = 4

    assert Variant(lora_alpha=5).lora_alpha == 5
    with refuses("`lora_dropout`", "Variant"):
        Variant(lora_dropout=0.1)


# --- files, copies, later versions ---

FULL: dict[str, Any] = {
    "density": 0.01,
    "rank_pattern": {"q": 4},
    "density_pattern": {"v": 0.5},
    "growth": "momentum",
    "regrow_every": 7,
    "accumulation_steps": 3,
    "initial_regrow_rate": 0.5,
    "regrow_schedule": "cosine",
    "total_steps": 100,
    "stop_regrowing_at": 0.9,
    "seed": 3,
    "target_modules": ["q", "v"],
    "exclude_modules": ["h.3.q"],
    "layers_to_transform": [0, 1],
    "layers_pattern": ["h"],
    "modules_to_save": ["score"],
    "trainable_token_indices": {"emb": [0, 1]},
    "ensure_weight_tying": True,
    "bias": "spiel_only",
    "fan_in_fan_out": True,
    "init_weights": False,
    "delta_dtype": "bfloat16",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "base",
    "revision": "main",
    "inference_mode": True,
    "auto_mapping": {"base_model_class": "A", "parent_library": "b"},
}
EXAMPLES: dict[str, dict[str, Any]] = {
    "default": {},
    "full": FULL,
    "r": {"r": 3, "target_modules": "all-linear"},
    "total": {"num_deltas": 77},
    "counts": {"num_deltas": {"h.0.q": 5, "h.1.q": 6}},
    "candidates": {"candidates": 2},
}
examples = pytest.mark.parametrize("kwargs", EXAMPLES.values(), ids=EXAMPLES.keys())


@examples
@pytest.mark.parametrize("loader", [PeftConfig, SpIELConfig])
def test_files_round_trip(kwargs: dict[str, Any], loader: type[PeftConfig], tmp_path: Path) -> None:
    config = SpIELConfig(**kwargs)
    config.save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = loader.from_pretrained(str(tmp_path))
    assert type(loaded) is SpIELConfig
    assert loaded == config
    assert loaded.peft_type is PeftType("SPIEL")


def test_a_saved_default_holds_plain_json(tmp_path: Path) -> None:
    SpIELConfig().save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "SPIEL"
    assert (saved["r"], saved["density"], saved["num_deltas"]) == (8, None, None)
    assert set(saved) == {field.name for field in dataclasses.fields(SpIELConfig)}


@examples
def test_copies_are_equal(kwargs: dict[str, Any]) -> None:
    config = SpIELConfig(**kwargs)
    for twin in (
        copy.copy(config),
        copy.deepcopy(config),
        dataclasses.replace(config),
        pickle.loads(pickle.dumps(config)),
        SpIELConfig(**config.to_dict()),
        SpIELConfig.from_peft_type(**config.to_dict()),
        get_peft_config(config.to_dict()),
    ):
        assert twin == config
        assert twin.peft_type is config.peft_type
        assert not twin._from_checkpoint


def test_configs_from_files_say_so(tmp_path: Path) -> None:
    """`PeftConfig.from_pretrained` is what PEFT's and transformers' loaders call."""
    SpIELConfig().save_pretrained(str(tmp_path))
    for loader in (PeftConfig, SpIELConfig):
        loaded = loader.from_pretrained(str(tmp_path))
        assert loaded._from_checkpoint
        assert copy.deepcopy(loaded)._from_checkpoint
        assert not dataclasses.replace(loaded)._from_checkpoint
        assert "_from_checkpoint" not in loaded.to_dict()
    assert not SpIELConfig(peft_type="SPIEL")._from_checkpoint
    assert not SpIELConfig._from_checkpoint


def test_a_file_without_version_still_counts_as_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "SPIEL", "r": 2}')
    loaded = SpIELConfig.from_pretrained(str(tmp_path))
    assert loaded._from_checkpoint and loaded.r == 2


def edit_saved(folder: Path, **changes: Any) -> str:
    SpIELConfig(r=5).save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(folder)


@pytest.mark.parametrize("loader", [PeftConfig, SpIELConfig])
def test_fields_of_a_later_version_warn_and_are_ignored(loader: type[PeftConfig], tmp_path: Path) -> None:
    folder = edit_saved(tmp_path, prune_by="age", zeta=None)
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['prune_by', 'zeta'\].*SpIELConfig"):
        loaded = loader.from_pretrained(folder)
    assert loaded == SpIELConfig(r=5)
    assert loaded._from_checkpoint


def test_an_unknown_field_in_code_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'desnity'"):
        SpIELConfig(desnity=0.1)


def test_wrong_values_in_a_file_are_refused_too(tmp_path: Path) -> None:
    with refuses("`seed` must be", "got -1"):
        PeftConfig.from_pretrained(edit_saved(tmp_path, seed=-1))
    with refuses("give exactly one", "`r=5`", "`density=0.1`"):
        PeftConfig.from_pretrained(edit_saved(tmp_path, density=0.1))
    with refuses("`density` must be", "got nan"):
        PeftConfig.from_pretrained(edit_saved(tmp_path, r=None, density=math.nan))


def test_the_signature_shows_the_fields() -> None:
    """PEFT reads it to tell known fields in a file from unknown ones."""
    fields = [field.name for field in dataclasses.fields(SpIELConfig)]
    assert list(inspect.signature(SpIELConfig).parameters) == fields
    assert list(inspect.signature(SpIELConfig.__init__).parameters) == ["self", *fields]


# --- growth criteria ---


def propose_first(request: GrowthRequest) -> torch.Tensor:
    return torch.arange(request.count)


def test_built_in_criteria() -> None:
    assert growth_criteria()[:4] == ["accumulated_gradient", "momentum", "random", "none"]
    needs = {name: get_growth_criterion(name) for name in growth_criteria()[:4]}
    assert [name for name, criterion in needs.items() if criterion.gathers] == ["accumulated_gradient"]
    assert [name for name, criterion in needs.items() if criterion.accumulates] == ["momentum"]
    assert [name for name, criterion in needs.items() if criterion.propose is None] == ["none"]


def test_a_registered_criterion_is_a_valid_growth(registry: None, tmp_path: Path) -> None:
    criterion = register_growth_criterion("first", propose_first)
    assert criterion == GrowthCriterion("first", propose_first) == get_growth_criterion("first")
    assert growth_criteria()[-1] == "first"
    assert json_round_trip(SpIELConfig(growth="first", accumulation_steps=99), tmp_path).growth == "first"


def test_a_registered_criterion_that_gathers_needs_short_windows(registry: None) -> None:
    register_growth_criterion("mine", propose_first, gathers=True)
    with refuses("`accumulation_steps`", "'mine'", "got 21"):
        SpIELConfig(growth="mine", accumulation_steps=21)


@pytest.mark.parametrize("name", ["", "two words", "a-b", "1st", None, 3], ids=repr)
def test_criterion_names_are_identifiers(registry: None, name: Any) -> None:
    with refuses("`name` of a growth criterion", f"got {name!r}"):
        register_growth_criterion(name, propose_first)


@pytest.mark.parametrize("name", ["random", "first"])
def test_criterion_names_are_taken_once(registry: None, name: str) -> None:
    if name == "first":
        register_growth_criterion(name, propose_first)
    with refuses("`name` of a growth criterion must be unused", f"got {name!r}", "override=True"):
        register_growth_criterion(name, propose_first)
    assert register_growth_criterion(name, propose_first, accumulates=True, override=True).accumulates
    assert get_growth_criterion(name).propose is propose_first
    assert growth_criteria().count(name) == 1


@pytest.mark.parametrize("propose", ["random", 3, torch.arange(3)], ids=["str", "int", "tensor"])
def test_criteria_are_functions(registry: None, propose: Any) -> None:
    with pytest.raises(TypeError, match="`propose` of growth criterion 'mine' must be a function"):
        register_growth_criterion("mine", propose)
    assert "mine" not in growth_criteria()


def test_criterion_flags_are_bools_and_need_a_reader(registry: None) -> None:
    with refuses("`gathers` of growth criterion 'mine' must be True or False", "got 1"):
        register_growth_criterion("mine", propose_first, gathers=1)  # type: ignore[arg-type]
    with refuses("'mine'", "`propose=None`", "accumulates=True"):
        register_growth_criterion("mine", None, accumulates=True)


@pytest.mark.parametrize("count", [0, 0.5, True, "2", float("inf"), float("nan")], ids=repr)
def test_candidates_per_grown_are_a_number_of_at_least_one(registry: None, count: Any) -> None:
    with refuses("`candidates_per_grown` of growth criterion 'mine'", f"got {count!r}"):
        register_growth_criterion("mine", propose_first, gathers=True, candidates_per_grown=count)
    assert "mine" not in growth_criteria()


def test_what_a_criterion_cannot_use_is_refused(registry: None) -> None:
    with refuses("`candidates_per_grown` of growth criterion 'mine'", "works only with `gathers=True`"):
        register_growth_criterion("mine", propose_first, candidates_per_grown=2)
    with refuses("'mine'", "`propose=None`", "prune_score="):
        register_growth_criterion("mine", None, prune_score=propose_first)
    with pytest.raises(TypeError, match="`prune_score` of growth criterion 'mine' must be a function"):
        register_growth_criterion("mine", propose_first, prune_score="magnitude")  # type: ignore[arg-type]
    assert "mine" not in growth_criteria()


def test_unknown_criteria_are_listed() -> None:
    with refuses("got 'mine'", "'accumulated_gradient'"):
        get_growth_criterion("mine")
