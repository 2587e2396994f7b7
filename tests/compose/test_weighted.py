"""Combinations of indices and values, against PEFT's own functions on dense tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor

from spiel_kernels import check_index_set, sample_positions
from spiel_peft.budget import density_count
from spiel_peft.compose.rules import Combination, combine_deltas

NUMEL = 60
WEIGHTS = [[1.0, 1.0], [0.5, -0.3], [-1.0, -1.0], [0.0, 2.0]]

Pair = tuple[Tensor, Tensor]


def random_pair(k: int, seed: int, dtype: torch.dtype = torch.float32) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(k, generator=generator).to(dtype)
    return sample_positions(NUMEL, k, generator).to(torch.int32), values


def dense(pair: Pair | None) -> Tensor:
    out = torch.zeros(NUMEL, dtype=torch.float64)
    if pair is not None:
        out[pair[0].long()] = pair[1].double()
    return out


def as_in_peft(keep: int) -> float:
    """The density at which PEFT keeps exactly this number of entries of the dense tensor."""
    return (keep + 0.5) / NUMEL


def combine(pairs: list[Pair | None], weights: list[float], kind: str = "linear", **settings: object) -> Pair:
    return combine_deltas(pairs, Combination(tuple(weights), kind, **settings), "layer")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_linear_is_the_weighted_sum_on_the_union(weights: list[float]) -> None:
    pairs = [random_pair(20, 1), random_pair(9, 2)]
    indices, values = combine(pairs, weights)
    union = sorted(set(pairs[0][0].tolist()) | set(pairs[1][0].tolist()))
    assert indices.tolist() == union and indices.dtype == torch.int32
    expected = merge_utils.task_arithmetic([dense(p) for p in pairs], torch.tensor(weights, dtype=torch.float64))
    assert torch.equal(values, expected[indices.long()].float())


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.25, 0.6, 1.0])
def test_ties_and_magnitude_prune_as_peft_has_them(density: float, method: str, weights: list[float]) -> None:
    # The same number of deltas everywhere: PEFT takes one density of the dense tensors.
    pairs = [random_pair(20, seed) for seed in (3, 4)]
    at = as_in_peft(density_count(density, 20))
    tensors, scale = [dense(p) for p in pairs], torch.tensor(weights, dtype=torch.float64)
    ties = merge_utils.ties(tensors, scale, at, method)
    got = combine(pairs, weights, "ties", density=density, majority_sign_method=method)
    assert torch.allclose(dense(got), ties, atol=1e-6)
    pruned = merge_utils.magnitude_prune(tensors, scale, at)
    got = combine(pairs, weights, "magnitude_prune", density=density)
    assert torch.allclose(dense(got), pruned, atol=1e-6)
    assert got[0].numel() == len({i for t in tensors for i in t.abs().topk(int(at * NUMEL)).indices.tolist()})


def test_signs_are_elected_without_the_weights_and_a_tie_is_positive() -> None:
    at = torch.tensor([7], dtype=torch.int32)
    three = [(at, torch.tensor([value])) for value in (-5.0, 2.0, 2.0)]
    total = combine(three, [1.0, 1.0, 1.0], "ties", density=1.0)
    frequency = combine(three, [1.0, 1.0, 1.0], "ties", density=1.0, majority_sign_method="frequency")
    assert total[1].item() == -5 and frequency[1].item() == 2
    even = [(at, torch.tensor([value])) for value in (-3.0, 3.0)]
    assert combine(even, [1.0, 0.5], "ties", density=1.0)[1].item() == 1.5
    # The signs agree, but the weights subtract one adapter from the other.
    same = [(at, torch.tensor([3.0]))] * 2
    assert combine(same, [1.0, -1.0], "ties", density=1.0)[1].item() == 0


@pytest.mark.parametrize(("kind", "oracle"), [("dare_linear", "task_arithmetic"), ("dare_ties", "ties")])
@pytest.mark.filterwarnings("ignore:The density 1.0 is greater")
def test_dare_keeps_random_deltas_scaled_up(kind: str, oracle: str) -> None:
    pairs = [random_pair(30, seed) for seed in (5, 6)]
    lone: list[list[Pair | None]] = [[pairs[0], None], [None, pairs[1]]]
    alone = [combine(both, [1.0, 1.0], "dare_linear", density=0.4) for both in lone]
    for (kept, values), (indices, originals) in zip(alone, pairs, strict=True):
        assert 0 < kept.numel() < 30
        slots = torch.searchsorted(indices, kept)
        assert torch.equal(indices[slots], kept)
        assert torch.allclose(values, originals[slots] / 0.4)
    weights = [0.7, -0.2]
    tensors, scale = [dense(p) for p in alone], torch.tensor(weights, dtype=torch.float64)
    # PEFT's rule applied to the deltas that are left, without pruning.
    rule: Callable[..., Tensor] = getattr(merge_utils, oracle)
    expected = rule(tensors, scale, 1.0) if oracle == "ties" else rule(tensors, scale)
    got = combine(pairs, weights, kind, density=0.4)
    assert torch.allclose(dense(got), expected, atol=1e-6)


def test_dare_depends_on_seed_module_and_place_alone_and_is_right_on_average() -> None:
    pairs: list[Pair | None] = [random_pair(30, 5), random_pair(30, 5)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = combine(pairs, [1.0, 1.0], "dare_linear", density=0.5)
    torch.manual_seed(2)
    assert torch.equal(dense(first), dense(combine(pairs, [1.0, 1.0], "dare_linear", density=0.5)))
    torch.set_rng_state(state)
    other_module = combine_deltas(pairs, Combination((1.0, 1.0), "dare_linear", 0.5), "another")
    other_seed = combine(pairs, [1.0, 1.0], "dare_linear", density=0.5, seed=1)
    assert not torch.equal(dense(first), dense(other_module)) and not torch.equal(dense(first), dense(other_seed))
    # The two adapters are equal, but different deltas of them are kept.
    assert not torch.equal(dense(first), 2 * dense(combine([pairs[0], None], [1.0, 1.0], "dare_linear", density=0.5)))
    draws = [dense(combine(pairs, [1.0, 1.0], "dare_linear", density=0.5, seed=seed)) for seed in range(400)]
    error = (torch.stack(draws).mean(0) - 2 * dense(pairs[0])).abs() / dense(pairs[0]).abs().clamp(min=1e-9)
    assert float(error[pairs[0][0].long()].max()) < 0.3


def test_a_missing_module_counts_as_zeros() -> None:
    pair = random_pair(10, 7)
    empty = torch.empty(0, dtype=torch.int32), torch.empty(0)
    for kind, density in (("linear", None), ("ties", 0.5), ("dare_ties", 0.5)):
        with_none = combine([pair, None], [2.0, 5.0], kind, density=density)
        with_empty = combine([pair, empty], [2.0, 5.0], kind, density=density)
        assert torch.equal(dense(with_none), dense(with_empty))
    assert torch.allclose(dense(combine([pair, None], [2.0, 5.0])), 2 * dense(pair))


def test_cancelled_positions_stay_unless_zeros_are_dropped() -> None:
    pairs: list[Pair | None] = [random_pair(10, 8), random_pair(10, 8)]
    indices, values = combine(pairs, [1.0, -1.0])
    assert torch.equal(indices, pairs[0][0]) and not values.any()
    indices, values = combine(pairs, [1.0, -1.0], drop_zeros=True)
    assert indices.shape == values.shape == (0,)


def test_pruning_takes_the_first_of_equals_and_leaves_one_at_least() -> None:
    indices = torch.tensor([4, 9, 30], dtype=torch.int32)
    ones = torch.ones(3)
    assert combine([(indices, ones)], [1.0], "magnitude_prune", density=0.7)[0].tolist() == [4, 9]
    assert combine([(indices, ones)], [1.0], "magnitude_prune", density=0.01)[0].tolist() == [4]


def test_widest_dtypes_win_and_values_are_rounded_once() -> None:
    half, single = random_pair(30, 9, torch.bfloat16), random_pair(30, 10)
    assert combine([half, half], [1.0, 0.5])[1].dtype == torch.bfloat16
    assert combine([half, (half[0], half[1].half())], [1.0, 0.5])[1].dtype == torch.float32
    indices, values = combine([half, (single[0].long(), single[1])], [1.0, 1 / 3])
    assert values.dtype == torch.float32 and indices.dtype == torch.int64
    expected = dense(half) + dense(single) / 3
    assert torch.equal(values, expected[indices].float())


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, NUMEL), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]),
    density=st.floats(0.01, 1.0),
)
def test_results_are_index_sets_inside_the_union(sizes: list[int], seed: int, kind: str, density: float) -> None:
    pairs: list[Pair | None] = [random_pair(size, seed + i) for i, size in enumerate(sizes)]
    weights = [(-1.0) ** i * (i + 0.5) for i in range(len(sizes))]
    indices, values = combine(pairs, weights, kind, density=None if kind == "linear" else density, seed=seed)
    assert check_index_set(indices, NUMEL) is None
    assert values.shape == indices.shape and bool(torch.isfinite(values).all())
    union = {i for pair in pairs for i in pair[0].tolist()}
    assert set(indices.tolist()) <= union
    if kind == "linear":
        assert set(indices.tolist()) == union


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"combination_type": "cat"}, "low-rank factors.*'linear'"),
        ({"combination_type": "dare_ties_svd"}, "low-rank factors"),
        ({"combination_type": "mean"}, "`combination_type` must be one of 'linear'"),
        ({"combination_type": None}, "`combination_type` must be one of"),
        ({"combination_type": "ties"}, "`density` is needed with combination_type='ties'"),
        ({"combination_type": "ties", "density": 0.0}, "`density` must be a number above 0 and at most 1, got 0.0"),
        ({"combination_type": "ties", "density": 1.5}, "`density` must be"),
        ({"combination_type": "ties", "density": math.nan}, "`density` must be"),
        ({"density": 0.5}, "`density` has no effect with combination_type='linear'"),
        ({"majority_sign_method": "vote"}, "`majority_sign_method` must be one of 'total', 'frequency'"),
        ({"seed": -1}, "`seed` must be an integer"),
        ({"drop_zeros": "yes"}, "`drop_zeros` must be True or False"),
        ({"weights": (1.0, math.nan)}, "weights must be finite numbers.*nan"),
        ({"weights": (1.0, "2")}, "weights must be finite numbers.*'2'"),
        ({"weights": (1.0, None)}, "weights must be finite numbers.*None"),
        ({"weights": 2.0}, "weights must be a list of numbers"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Combination(**{"weights": (1.0, 1.0), **arguments})


def test_a_result_that_overflows_is_refused() -> None:
    pair = torch.tensor([3], dtype=torch.int32), torch.tensor([6e4], dtype=torch.float16)
    with pytest.raises(ValueError, match="layer: combined deltas are not finite in torch.float16"):
        combine([pair, pair], [1.0, 1.0])
