"""How the budget is split over the targeted modules."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from support.adapters import adapted, deltas_of, spiel_config
from support.models import logits, tiny_llama
from support.tensors import same_bits, texts
from torch import nn
from transformers.pytorch_utils import Conv1D

from spiel_peft import SpIELConfig
from spiel_peft.budget import allocate_deltas, density_count
from spiel_peft.weights.base_weight import BaseInfo

Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SIZES = {"self_attn.q_proj": 16 * 16, "mlp.down_proj": 16 * 24}


def info(rows: int, cols: int) -> BaseInfo:
    return BaseInfo("linear", (rows, cols), cols, rows, None)


def counts(model: nn.Module) -> dict[str, int]:
    return {module: delta.k for module, delta in deltas_of(model).items()}


class Zoo(nn.Module):
    """One layer of every plain kind, convolutions with groups too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(9, 14)
        self.conv1d_tf = Conv1D(14, 9)
        self.embedding = nn.Embedding(23, 9)
        self.conv1 = nn.Conv1d(8, 12, 5)
        self.conv2 = nn.Conv2d(6, 10, (3, 2))
        self.conv3 = nn.Conv3d(4, 6, 2)
        self.grouped = nn.Conv2d(12, 8, 3, groups=4)


KINDS = ["linear", "conv1d_tf", "embedding", "conv1", "conv2", "conv3"]


# --- r ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3])
def test_r_trains_as_many_values_as_lora(kind: str, rank: int) -> None:
    lora = get_peft_model(Zoo(), LoraConfig(r=rank, target_modules=[kind]))
    ours = get_peft_model(Zoo(), SpIELConfig(r=rank, target_modules=[kind]))
    assert ours.get_nb_trainable_parameters()[0] == lora.get_nb_trainable_parameters()[0]


def test_r_on_a_grouped_convolution_counts_inputs_per_group() -> None:
    ours = get_peft_model(Zoo(), SpIELConfig(r=2, target_modules=["grouped"]))
    assert ours.get_nb_trainable_parameters()[0] == 2 * (12 // 4 * 9 + 8)
    assert counts(ours) == {"grouped": 70}


def test_r_on_a_llama_trains_as_many_values_as_lora() -> None:
    lora = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ours = get_peft_model(tiny_llama(), SpIELConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert ours.get_nb_trainable_parameters()[0] == lora.get_nb_trainable_parameters()[0]


def test_the_default_is_rank_8() -> None:
    assert SpIELConfig().r == 8
    model = get_peft_model(tiny_llama(hidden_size=32), SpIELConfig(target_modules=["q_proj"]))
    assert set(counts(model).values()) == {8 * 64}


# --- density ---


@given(st.integers(1, 10**7), st.floats(1e-9, 1.0))
def test_density_rounds_half_up_and_never_to_nothing(numel: int, density: float) -> None:
    count = density_count(density, numel)
    assert count == max(1, math.floor(density * numel + 0.5))
    assert 1 <= count <= numel


@pytest.mark.parametrize(("density", "expected"), [(0.5, 3), (0.25, 1), (0.3, 2), (0.29, 1), (1e-9, 1), (1.0, 5)])
def test_density_by_hand(density: float, expected: int) -> None:
    """5 entries: 2.5 rounds up to 3, 1.25 down to 1, 1.5 up to 2."""
    assert density_count(density, 5) == expected
    config = SpIELConfig(density=density, target_modules=["x"])
    assert allocate_deltas(config, {"x": info(5, 1)}) == {"x": expected}


def test_density_of_a_model() -> None:
    model = adapted(density=0.1)
    assert counts(model) == {
        f"model.layers.{layer}.{name}": math.floor(size * 0.1 + 0.5) for layer in (0, 1) for name, size in SIZES.items()
    }


# --- a total ---

shapes = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(1, 5000), min_size=1, max_size=12)


@given(shapes, st.data())
def test_a_total_is_split_exactly_and_in_proportion(sizes: dict[str, int], data: st.DataObject) -> None:
    total = data.draw(st.integers(len(sizes), sum(sizes.values())))
    config = SpIELConfig(num_deltas=total, target_modules=sorted(sizes))
    split = allocate_deltas(config, {name: info(size, 1) for name, size in sizes.items()})
    assert sum(split.values()) == total
    assert all(1 <= split[name] <= sizes[name] for name in sizes)
    assert all(split[a] <= split[b] + 1 for a in sizes for b in sizes if sizes[a] <= sizes[b])
    if total * min(sizes.values()) >= sum(sizes.values()):  # no module needs more than its share
        assert all(abs(split[name] - total * size / sum(sizes.values())) < 1 for name, size in sizes.items())


@pytest.mark.parametrize(
    ("total", "sizes", "expected"),
    [
        (10, {"a": 50, "b": 30, "c": 20}, {"a": 5, "b": 3, "c": 2}),
        (11, {"a": 50, "b": 30, "c": 20}, {"a": 6, "b": 3, "c": 2}),  # 5.5, 3.3, 2.2
        (6, {"a": 5, "b": 1}, {"a": 5, "b": 1}),
        (20, {"a": 1000, "b": 900, "c": 1, "d": 1}, {"a": 9, "b": 9, "c": 1, "d": 1}),  # 18 left: 9.47, 8.53
        (10**12 + 1, {"a": 2**40, "b": 2**40}, {"a": 5 * 10**11 + 1, "b": 5 * 10**11}),
    ],
)
def test_a_total_by_hand(total: int, sizes: dict[str, int], expected: dict[str, int]) -> None:
    config = SpIELConfig(num_deltas=total, target_modules=sorted(sizes))
    assert allocate_deltas(config, {name: info(size, 1) for name, size in sizes.items()}) == expected


def test_equal_modules_share_a_remainder_by_name() -> None:
    config = SpIELConfig(num_deltas=11, target_modules=["b", "a", "c"])
    assert allocate_deltas(config, {name: info(6, 6) for name in "bca"}) == {"a": 4, "b": 4, "c": 3}


def test_a_total_that_is_too_small_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="num_deltas=3 does not fit: 4 modules share 3 of it"):
        get_peft_model(model, spiel_config(num_deltas=3))
    assert not deltas_of(model)


def test_a_total_of_a_model_is_its_trainable_count() -> None:
    assert adapted(num_deltas=777).get_nb_trainable_parameters()[0] == 777


# --- a dict ---


def test_a_dict_selects_its_targets() -> None:
    assert counts(adapted(num_deltas={Q0: 5, DOWN1: 7})) == {Q0: 5, DOWN1: 7}


def test_a_dict_of_many_modules_survives_saving(tmp_path: Path) -> None:
    """PEFT shortens more than 20 targets to suffixes, which must not select anything else on reload."""
    base = tiny_llama(num_hidden_layers=12)
    wanted = {f"model.layers.{i}.self_attn.{name}": 3 + i for i in range(12) for name in ("q_proj", "v_proj")}
    del wanted["model.layers.5.self_attn.v_proj"]
    model = adapted(base, num_deltas=wanted)
    assert counts(model) == wanted
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(num_hidden_layers=12), tmp_path)
    assert counts(loaded) == wanted
    assert loaded.peft_config["default"].num_deltas == wanted
    assert same_bits(logits(loaded), logits(model))
    loaded.add_adapter("again", loaded.peft_config["default"])
    assert counts(loaded) == wanted


@pytest.mark.parametrize(
    ("listed", "error", "message"),
    [
        ({Q0: 3, "model.layers.7.self_attn.q_proj": 3}, ValueError, r"not targeted: \['model.layers.7"),
        ({"model.layers.7.self_attn.q_proj": 3}, ValueError, "not found in the base model"),
        ({"q_proj": 3}, ValueError, "num_deltas names modules that are not targeted"),
        ({"model.norm": 3}, ValueError, r"model\.norm \(.*LlamaRMSNorm\) is not a supported layer"),
    ],
)
def test_a_dict_that_does_not_fit_is_refused(listed: dict[str, int], error: type[Exception], message: str) -> None:
    model = tiny_llama()
    with pytest.raises(error, match=message):
        get_peft_model(model, spiel_config(num_deltas=listed))
    assert not deltas_of(model)


# --- more than there is ---


def test_clamping_warns_once_and_names_the_modules() -> None:
    with pytest.warns(UserWarning) as record:
        model = adapted(r=9)  # 288 of 256 in q_proj, 360 of 384 in down_proj
    assert texts(record).count("trained whole") == 1
    assert "model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj." in texts(record)
    assert counts(model)[Q0] == 256 and counts(model)[DOWN1] == 360
    assert torch.equal(deltas_of(model)[Q0].indices, torch.arange(256, dtype=torch.int32))


def test_clamping_names_five_modules_at_most() -> None:
    with pytest.warns(UserWarning, match="and 7 more"):
        adapted(tiny_llama(num_hidden_layers=12), r=9, target_modules=["q_proj"])


def test_a_density_of_one_needs_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trained whole")
        assert set(counts(adapted(density=1.0)).values()) == {256, 384}


# --- patterns ---


def test_patterns_override_the_budget_of_the_modules_they_match() -> None:
    model = adapted(
        r=1,
        rank_pattern={"layers.0.*q_proj": 3, "model.layers.1.mlp.down_proj": 2},
        density_pattern={"layers.1.*q_proj": 0.5},
    )
    assert counts(model) == {
        Q0: 3 * 32,
        "model.layers.1.self_attn.q_proj": 128,
        "model.layers.0.mlp.down_proj": 40,
        DOWN1: 2 * 40,
    }


def test_patterns_take_their_share_of_a_total_first() -> None:
    model = adapted(num_deltas=500, rank_pattern={"q_proj": 2})
    assert counts(model)[Q0] == counts(model)["model.layers.1.self_attn.q_proj"] == 64
    assert sum(counts(model).values()) == 500


def test_a_total_that_the_patterns_use_up_is_refused() -> None:
    with pytest.raises(ValueError, match="num_deltas=129 does not fit: 2 modules share 1 of it"):
        adapted(num_deltas=129, rank_pattern={"q_proj": 2})


def test_patterns_that_cover_everything_contradict_a_total() -> None:
    with pytest.raises(ValueError, match="num_deltas=500 does not fit: .*match every module, leave 292 of it over"):
        adapted(num_deltas=500, rank_pattern={"q_proj": 2, "down_proj": 1})
    adapted(num_deltas=208, rank_pattern={"q_proj": 2, "down_proj": 1})


def test_two_patterns_for_one_module_are_refused() -> None:
    with pytest.raises(ValueError, match=f"rank_pattern and density_pattern both match module '{Q0}'"):
        adapted(r=1, rank_pattern={"q_proj": 2}, density_pattern={"layers.0.self_attn.*": 0.1})


def test_patterns_survive_saving(tmp_path: Path) -> None:
    model = adapted(density=0.02, rank_pattern={"q_proj": 2}, density_pattern={"layers.0.mlp.down_proj": 0.3})
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert counts(loaded) == counts(model)
    assert same_bits(logits(loaded), logits(model))


def test_a_density_pattern_that_matches_nothing_is_reported_like_a_rank_pattern() -> None:
    with pytest.warns(RuntimeWarning) as record:
        adapted(r=1, rank_pattern={"k_proj": 2}, density_pattern={"v_proj": 0.1})
    assert "rank_pattern keys did not match any targeted module and were ignored: ['k_proj']" in texts(record)
    assert "density_pattern keys did not match any targeted module and were ignored: ['v_proj']" in texts(record)
