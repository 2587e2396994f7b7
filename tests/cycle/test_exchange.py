"""The positions that a close chooses, compared with brute force, and how a close changes an index set."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spiel_kernels import check_index_set, replace_positions
from spiel_peft.cycle.close import decide_exchange
from spiel_peft.cycle.optimizer_buffers import permute

NUMEL = 30


def brute_force(active: list[int], values: list[float], proposed: list[int], count: int) -> tuple[set[int], list[int]]:
    """The positions that a close prunes and grows, computed directly from the definition."""
    order = sorted(range(len(active)), key=lambda slot: (abs(values[slot]), active[slot]))
    for m in range(min(count, len(active)), -1, -1):
        pruned = {active[slot] for slot in order[:m]}
        eligible = [p for p in proposed if p not in active or p in pruned]
        if len(eligible) >= m:
            chosen = eligible[:m]
            return pruned - set(chosen), [p for p in chosen if p not in pruned]
    raise AssertionError("m = 0 always fits")


@st.composite
def closes(draw: st.DrawFn) -> tuple[list[int], list[float], list[int], int]:
    active = sorted(draw(st.sets(st.integers(0, NUMEL - 1), min_size=1, max_size=12)))
    # Few different values, so that ties are common.
    value = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -2.0, 3.0])
    values = draw(st.lists(value, min_size=len(active), max_size=len(active)))
    proposed = draw(st.lists(st.integers(0, NUMEL - 1), unique=True, max_size=14))
    return active, values, proposed, draw(st.integers(0, 14))


@settings(max_examples=400, deadline=None)
@given(closes())
def test_equals_brute_force(case: tuple[list[int], list[float], list[int], int]) -> None:
    active, values, proposed, count = case
    exchange = decide_exchange(
        torch.tensor(active, dtype=torch.int32),
        torch.tensor(values).abs(),
        torch.tensor(proposed, dtype=torch.int64),
        count,
    )
    dropped, grown = brute_force(active, values, proposed, count)
    assert {p for p, drop in zip(active, exchange.drop.tolist(), strict=True) if drop} == dropped
    assert exchange.grown.tolist() == grown


@settings(max_examples=200, deadline=None)
@given(closes())
def test_a_close_keeps_the_set_sound_and_moves_values_with_their_positions(
    case: tuple[list[int], list[float], list[int], int],
) -> None:
    active, values, proposed, count = case
    indices = torch.tensor(active)
    exchange = decide_exchange(indices, torch.tensor(values).abs(), torch.tensor(proposed, dtype=torch.int64), count)
    new, source = replace_positions(indices, exchange.drop, exchange.grown)
    assert check_index_set(new.to(torch.int32), NUMEL) is None
    assert new.numel() == len(active)
    grown = exchange.grown.tolist()
    # A tag that names its position; grown ones get the negative.
    tags = permute(indices.double(), source, -exchange.grown.double())
    for position, tag in zip(new.tolist(), tags.tolist(), strict=True):
        assert tag == (-position if position in grown else position)


def test_a_pruned_position_that_is_proposed_stays() -> None:
    exchange = decide_exchange(torch.tensor([2, 5, 9]), torch.tensor([0.1, 3.0, 0.2]), torch.tensor([9, 2, 4]), count=2)
    assert not exchange.drop.any()
    assert exchange.grown.numel() == 0


def test_too_few_proposals_prune_only_as_many() -> None:
    exchange = decide_exchange(torch.tensor([2, 5, 9]), torch.tensor([0.3, 0.1, 0.2]), torch.tensor([7]), count=3)
    assert exchange.drop.tolist() == [False, True, False]
    assert exchange.grown.tolist() == [7]


def test_ties_prune_the_lowest_position_first() -> None:
    exchange = decide_exchange(torch.tensor([2, 5, 9]), torch.zeros(3), torch.tensor([0, 1, 3]), count=2)
    assert exchange.drop.tolist() == [True, True, False]
    assert exchange.grown.tolist() == [0, 1]


def test_nothing_to_do() -> None:
    exchange = decide_exchange(torch.tensor([2]), torch.ones(1), torch.empty(0, dtype=torch.int64), count=0)
    assert not exchange.drop.any()
    assert exchange.grown.numel() == 0
