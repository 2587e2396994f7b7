"""The best positions of an outer sum by Triton: those of PyTorch and of the dense formula, in the same order."""

from __future__ import annotations

import math

import pytest
import torch

from spiel_kernels import momentum, top_outer_positions, top_outer_positions_padded
from spiel_kernels.dispatch import use_backend
from spiel_kernels.momentum import top_outer_positions_dense
from spiel_kernels.triton_backend import top_outer

from ..oracle import draw_indices


def draw(size: int, kind: str) -> torch.Tensor:
    """Accumulators that are spread over decades, equal, almost equal, equal in groups, or not all usable."""
    values = {
        "spread": lambda: torch.randn(size, dtype=torch.float64).mul(4).exp(),
        "tiny": lambda: torch.rand(size) * 1e-38,
        "ones": lambda: torch.ones(size),
        "equal": lambda: torch.full((size,), 0.3),
        "near": lambda: 1 + torch.randint(-3, 4, (size,)).double() * 2.0**-52,
        "powers": lambda: torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0])[torch.randint(5, (size,))],
        "odd": lambda: torch.tensor([0.0, 1.0, 3.0, math.inf, math.nan, -1.0])[torch.randint(6, (size,))],
    }[kind]()
    if kind in ("spread", "ones", "near"):
        values[3::5] = 0.0
    return values


@pytest.fixture
def small_blocks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows also for small matrices."""
    monkeypatch.setattr(top_outer, "_SEARCH_BLOCK", 16)
    monkeypatch.setattr(top_outer, "_SEARCH_WARPS", 1)
    monkeypatch.setattr(top_outer, "_LIST_BLOCK", 32)


def check(row: torch.Tensor, col: torch.Tensor, excluded: torch.Tensor, m: int, device: str) -> None:
    row, col, excluded = row.to(device), col.to(device), excluded.to(device)
    expected = top_outer_positions_dense(row, col, excluded, m).tolist()
    with use_backend("triton"):
        got = top_outer_positions_padded(row, col, excluded, m)
        without_gaps = top_outer_positions(row, col, excluded, m)
    assert got.dtype == torch.int64
    assert got.tolist() == expected + [-1] * (m - len(expected))
    assert without_gaps.tolist() == expected


KINDS = [("spread", "spread"), ("tiny", "odd"), ("ones", "ones"), ("equal", "near"), ("near", "near")]
KINDS += [("powers", "powers"), ("odd", "odd"), ("equal", "spread")]
SHAPES = [(1, 50), (50, 1), (16, 32), (33, 9)]


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
@pytest.mark.parametrize("rows, cols", SHAPES)
@pytest.mark.usefixtures("small_blocks")
def test_equals_the_dense_formula(rows: int, cols: int, kinds: tuple[str, str], device: str) -> None:
    """Also where fewer candidates are left than wanted."""
    numel = rows * cols
    for share, wanted, dtype in ((0.0, 0.1, torch.int32), (0.3, 0.2, torch.int64), (0.95, 0.5, torch.int32)):
        excluded = draw_indices(numel, int(share * numel), dtype)
        check(draw(rows, kinds[0]), draw(cols, kinds[1]), excluded, int(wanted * numel) + 1, device)


@pytest.mark.parametrize("rows, cols", [(301, 40), (40, 301)])
@pytest.mark.parametrize("kind", ["spread", "near", "ones"])
def test_equals_pytorch_in_blocks_of_full_size(rows: int, cols: int, kind: str, device: str) -> None:
    row, col = draw(rows, kind).to(device), draw(cols, kind).to(device)
    excluded = draw_indices(rows * cols, 500, torch.int32).to(device)
    with use_backend("torch"):
        expected = top_outer_positions(row, col, excluded, 200)
    with use_backend("triton"):
        assert torch.equal(top_outer_positions(row, col, excluded, 200), expected)


@pytest.mark.parametrize("left", [0, 1])
def test_a_single_position_and_a_full_index_set(left: int, device: str) -> None:
    check(torch.ones(1), torch.ones(1), torch.arange(1 - left), 2, device)
    check(torch.rand(4), torch.rand(5), draw_indices(20, 20 - left, torch.int32), 3, device)


@pytest.mark.usefixtures("small_blocks")
def test_the_best_may_all_be_taken(device: str) -> None:
    """The rank of the worst position that is listed is then the number of those taken and those wanted."""
    row, col = draw(30, "spread"), draw(20, "spread")
    best = top_outer_positions_dense(row, col, torch.empty(0, dtype=torch.int64), 200)
    check(row, col, best.sort().values, 60, device)


@pytest.mark.usefixtures("small_blocks")
def test_equal_scores_are_not_all_listed(device: str) -> None:
    """As many as are wanted and a row more."""
    logs = torch.zeros(40, dtype=torch.float64, device=device), torch.zeros(30, dtype=torch.float64, device=device)
    scores, positions = top_outer.list_candidates(*logs, torch.tensor([0, 31, 60], device=device), 65)
    expected = [position for position in range(90) if position not in (0, 31, 60)]
    assert positions[positions >= 0].sort().values.tolist() == expected
    assert scores.numel() == 65 + 3 + 30 and torch.equal(scores > -math.inf, positions >= 0)


@pytest.mark.usefixtures("small_blocks")
def test_strided_and_narrow_accumulators(device: str) -> None:
    row, col = torch.rand(46).bfloat16()[::2], torch.rand(27)[::3].double()
    check(row, col, draw_indices(23 * 9, 80)[::2], 50, device)


def test_nothing_wanted_and_empty_matrices(device: str) -> None:
    empty = torch.empty(0, device=device)
    for row, col, m in ((empty, torch.ones(3, device=device), 2), (torch.ones(3, device=device), empty, 1)):
        with use_backend("triton"):
            assert top_outer_positions_padded(row, col, empty.long(), m).tolist() == [-1] * m
            assert top_outer_positions(row, col, empty.long(), m).tolist() == []
    assert top_outer_positions_padded(torch.ones(2), torch.ones(2), torch.empty(0).int(), 0).tolist() == []


def test_more_positions_than_the_search_may_add_up_in_32_bits(device: str) -> None:
    """Counts are sums of 64 bits: a matrix with more than 2**31 candidates, of which the last few are wanted."""
    row, col = torch.ones(1 << 16), torch.ones(1 << 16)
    row[-1], col[-1] = 2.0, 3.0
    excluded = torch.empty(0, dtype=torch.int64)
    with use_backend("triton"):
        got = top_outer_positions_padded(row.to(device), col.to(device), excluded.to(device), 4)
    with use_backend("torch"):
        assert got.tolist() == momentum.top_outer_positions(row, col, excluded, 4).tolist()
    assert got[0] == (1 << 32) - 1
