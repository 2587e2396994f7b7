"""The positions that a close chooses, compared with brute force, and how a close changes an index set."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spiel_kernels import check_index_set
from spiel_peft.cycle.exchange import NO_POSITION, STAYS, Moves, exchanges

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


def tensors(case: tuple[list[int], list[float], list[int], int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    active, values, proposed, _ = case
    return (
        torch.tensor(active, dtype=torch.int32),
        torch.tensor(values).abs(),
        torch.tensor(proposed, dtype=torch.int64),
    )


def assert_is_brute_force(incoming: torch.Tensor, case: tuple[list[int], list[float], list[int], int]) -> None:
    active, values, proposed, count = case
    dropped, grown = brute_force(active, values, [p for p in proposed if p != NO_POSITION], count)
    assert {p for p, other in zip(active, incoming.tolist(), strict=True) if other != STAYS} == dropped
    assert sorted(incoming[incoming != STAYS].tolist()) == sorted(grown)


def one(active: list[int], values: list[float], proposed: list[int], count: int) -> list[int]:
    """The exchange of one matrix."""
    indices, scores, positions = tensors((active, values, proposed, count))
    return exchanges([indices], [scores], [positions], [count])[0].tolist()


@settings(max_examples=400, deadline=None)
@given(closes())
def test_equals_brute_force(case: tuple[list[int], list[float], list[int], int]) -> None:
    indices, scores, proposed = tensors(case)
    (incoming,) = exchanges([indices], [scores], [proposed], [case[3]])
    assert incoming.dtype == indices.dtype
    assert_is_brute_force(incoming, case)


@settings(max_examples=200, deadline=None)
@given(st.lists(closes(), min_size=2, max_size=5), st.booleans())
def test_matrices_that_are_joined_equal_brute_force_each(
    cases: list[tuple[list[int], list[float], list[int], int]], wide: bool
) -> None:
    # Positions that are left out stand anywhere among the others.
    cases = [(active, values, [*proposed[:2], NO_POSITION, *proposed[2:]], m) for active, values, proposed, m in cases]
    index_sets, scores, proposed = zip(*map(tensors, cases), strict=True)
    if wide:
        scores = [of_matrix.double() for of_matrix in scores]
    incoming = exchanges(index_sets, scores, proposed, [count for *_, count in cases])
    for of_matrix, case in zip(incoming, cases, strict=True):
        assert_is_brute_force(of_matrix, case)
    moves = Moves.of(index_sets, incoming)
    tags = moves.apply(torch.cat([i.double() + 1 for i in index_sets]), -moves.entries.positions(moves.incoming) - 1)
    for number, (new, of_matrix) in enumerate(zip(moves.indices(torch.int32), incoming, strict=True)):
        alone = Moves.of([index_sets[number]], [of_matrix])
        assert torch.equal(new, alone.indices(torch.int32)[0])
        assert check_index_set(new, NUMEL) is None
        grown = set(of_matrix[of_matrix != STAYS].tolist())
        # A tag that names its position; grown ones get the negative.
        for position, tag in zip(new.tolist(), tags[moves.entries.slice(number)].tolist(), strict=True):
            assert tag == (-position - 1 if position in grown else position + 1)
        same = moves.single(number)
        assert torch.equal(same.keys, alone.keys) and torch.equal(same.incoming, alone.incoming)
        assert torch.equal(same.order, alone.order)


def test_a_pruned_position_that_is_proposed_stays() -> None:
    assert one([2, 5, 9], [0.1, 3.0, 0.2], [9, 2, 4], 2) == [STAYS, STAYS, STAYS]


def test_too_few_proposals_prune_only_as_many() -> None:
    assert one([2, 5, 9], [0.3, 0.1, 0.2], [7], 3) == [STAYS, 7, STAYS]


def test_ties_prune_the_lowest_position_first() -> None:
    assert one([2, 5, 9], [0.0, 0.0, 0.0], [0, 1, 3], 2) == [0, 1, STAYS]


def test_nothing_to_do() -> None:
    assert one([2], [1.0], [], 0) == [STAYS]
