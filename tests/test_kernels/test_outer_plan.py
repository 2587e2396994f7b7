"""`plan_outer` and the PyTorch execution of its plans."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tensors import assert_close
from torch import Tensor

from spiel_kernels import outer_products
from spiel_kernels.gather import gather_planned
from spiel_kernels.index_set import row_bounds
from spiel_kernels.outer_plan import (
    PLANNED_METHODS,
    TILE_SHAPES,
    CostModel,
    OuterPlan,
    Problem,
    choose_method,
    choose_tile_shape,
    estimate_costs,
    known_plan,
    narrow_dtype,
    plan_for,
    plan_outer,
    plan_together,
    token_splits,
)
from spiel_kernels.outer_products import gather_by_plan, locate_entries, tile_operands

from .oracle import DTYPE_IDS, DTYPES, draw_indices, outer_entries, property_test

SIZES = [(1, 1, 1), (3, 1, 200), (2, 63, 65), (17, 130, 7), (0, 5, 4), (2, 64, 64), (1, 200, 1)]
FORCED = [("compact", shape) for shape in TILE_SHAPES] + [("dense", None), ("entries", None)]
FORCED_IDS = [f"{method}-{shape[0]}x{shape[1]}" if shape else method for method, shape in FORCED]


def draw_clustered(rows: int, cols: int, k: int) -> Tensor:
    """Positions of the largest entries of a matrix whose rows and columns have heavy-tailed norms."""
    profile = torch.outer(torch.randn(rows).mul(1.5).exp(), torch.randn(cols).mul(1.5).exp())
    return (profile * torch.randn(rows, cols).abs()).flatten().topk(k).indices.sort().values


@pytest.mark.parametrize("dtype, tolerance", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("method, shape", FORCED, ids=FORCED_IDS)
@pytest.mark.parametrize("n, rows, cols", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.05, 1.0], ids=["none", "some", "all"])
def test_every_method_gathers_the_entries(
    n: int,
    rows: int,
    cols: int,
    share: float,
    method: str,
    shape: tuple[int, int] | None,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    a, b = torch.randn(n, rows).to(dtype), torch.randn(n, cols).to(dtype)
    indices = draw_indices(rows * cols, math.ceil(share * rows * cols), torch.int32)
    plan = plan_outer(indices, rows, cols, n, dtype, method, tile_shape=shape)
    assert plan.method == method
    got = gather_planned(a, b, indices, plan)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = (a.double().T @ b.double()).flatten()[indices.long()]
    assert_close(got, expected, tolerance)


@pytest.mark.parametrize("method, shape", FORCED, ids=FORCED_IDS)
def test_strided_operands_and_both_index_widths(method: str, shape: tuple[int, int] | None) -> None:
    a, b = torch.randn(70, 8).T, torch.randn(16, 210)[::2, ::3]
    for dtype in (torch.int32, torch.int64):
        indices = draw_clustered(70, 70, 90).to(dtype)
        plan = plan_outer(indices, 70, 70, 8, a.dtype, method, tile_shape=shape)
        assert_close(gather_planned(a, b, indices, plan), outer_entries(a, b, indices), 1e-5)


@pytest.mark.parametrize("method, shape", FORCED, ids=FORCED_IDS)
def test_a_full_row_among_empty_ones(method: str, shape: tuple[int, int] | None) -> None:
    """Rows 0 to 149 and 151 to 199 are empty: blocks without tiles, and rows that share a block with a full one."""
    a, b = torch.randn(3, 200), torch.randn(3, 90)
    indices = torch.arange(150 * 90, 151 * 90)
    plan = plan_outer(indices, 200, 90, 3, a.dtype, method, tile_shape=shape)
    assert_close(gather_planned(a, b, indices, plan), (a.T @ b).flatten()[indices], 1e-5)


def test_a_plan_serves_any_number_of_tokens() -> None:
    indices = draw_clustered(66, 70, 50)
    plan = plan_outer(indices, 66, 70, 4, torch.float32, "compact")
    for n in (0, 1, 9):
        a, b = torch.randn(n, 66), torch.randn(n, 70)
        assert_close(gather_planned(a, b, indices, plan), outer_entries(a, b, indices), 1e-5)


def test_dense_row_blocks_without_positions_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spiel_kernels.outer_plan.DENSE_BLOCK_ENTRIES", 40)
    computed = []
    block = outer_products.outer_block
    monkeypatch.setattr(outer_products, "outer_block", lambda a, b: computed.append(a.shape[1]) or block(a, b))
    a, b = torch.randn(3, 33), torch.randn(3, 8)
    indices = torch.tensor([0, 39, 40, 41, 130, 263])
    plan = plan_outer(indices, 33, 8, 3, a.dtype, "dense")
    assert (plan.layout, plan.tensors) == ((), ())
    got = gather_planned(a, b, indices, plan)
    assert computed == [5, 5, 5, 3]  # of seven blocks
    assert_close(got, outer_entries(a, b, indices), 1e-5)


@property_test
@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.floats(0, 1),
    st.sampled_from(TILE_SHAPES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_tiles_cover_each_position_exactly_once(
    rows: int, cols: int, share: float, shape: tuple[int, int], clustered: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    k = round(share**3 * rows * cols)
    indices = draw_clustered(rows, cols, k) if clustered else draw_indices(rows * cols, k, torch.int32)
    plan = plan_outer(indices, rows, cols, 8, torch.float32, "compact", tile_shape=shape)
    tile, place = locate_entries(indices, plan)
    seen = torch.full((k,), -1, dtype=torch.int64)
    for number in range(plan.tiles.block.numel()):
        tile_rows, tile_cols = tile_operands(plan.tiles, plan.layout, number)
        assert tile_rows.shape == shape[:1] and tile_cols.shape == shape[1:]
        positions = (tile_rows[:, None] * cols + tile_cols).flatten()
        mine = (tile == number).nonzero().flatten()
        assert mine.numel(), "a tile that holds no position is computed for nothing"
        assert place[mine].unique().numel() == mine.numel()
        seen[mine] = positions[place[mine]]
    assert torch.equal(seen, indices.long())


def test_tiles_are_in_order() -> None:
    """Tiles of one row block follow each other; rows are in order of falling count, a block's columns ascend."""
    rows, cols = 300, 260
    indices = draw_clustered(rows, cols, 3000)
    plan = plan_outer(indices, rows, cols, 8, torch.float32, "compact", tile_shape=(64, 64))
    tiles = plan.tiles
    counts = torch.bincount(indices // cols, minlength=rows)
    order = tiles.row_order.long()
    assert (counts[order[:rows]].diff() <= 0).all()
    assert torch.equal(order[tiles.row_rank.long()], torch.arange(rows))
    assert (order[rows:] == order[rows - 1]).all()
    assert (tiles.block.diff() >= 0).all()
    assert torch.equal(tiles.first_tile.diff(), torch.bincount(tiles.block, minlength=6))
    for begin, end in zip(tiles.first_tile[:-1].tolist(), tiles.first_tile[1:].tolist(), strict=True):
        assert (tiles.columns[64 * begin : 64 * end].diff() >= 0).all()


def test_equal_index_sets_make_equal_plans() -> None:
    indices = draw_clustered(150, 140, 900)
    for dtype in (torch.int32, torch.int64):
        one, two = (plan_outer(indices.to(dtype), 150, 140, 8, torch.bfloat16, "compact") for _ in range(2))
        assert one.layout == two.layout
        assert all(torch.equal(x, y) for x, y in zip(one.tensors, two.tensors, strict=True))


def test_a_plan_holds_little_and_saves_products() -> None:
    """Positions picked by gradient (1% of 1024 x 1024) need few tiles, which makes the method worth while."""
    indices = draw_clustered(1024, 1024, 10486).to(torch.int32)
    plan = plan_outer(indices, 1024, 1024, 2048, torch.bfloat16, "compact", tile_shape=(64, 64))
    assert plan.product_share < 0.12
    assert plan.nbytes < 0.3 * indices.nbytes
    assert plan_outer(indices, 1024, 1024, 2048, torch.bfloat16, "entries").nbytes == 0


def test_numbers_are_as_narrow_as_they_may_be() -> None:
    assert narrow_dtype(2**15) == torch.int16
    assert narrow_dtype(2**15 + 1) == torch.int32
    wide = plan_outer(torch.tensor([5, 40000]), 1, 40001, 1, torch.float32, "compact")
    assert wide.tiles.columns.dtype == torch.int32 and wide.tiles.row_order.dtype == torch.int16
    a, b = torch.ones(1, 1), torch.arange(40001.0)[None]
    assert gather_planned(a, b, torch.tensor([5, 40000]), wide).tolist() == [5, 40000]


def test_positions_beyond_int32() -> None:
    """A matrix of 2**32 entries, with positions in its last column block only."""
    rows, cols = 2, 2**31
    indices = torch.tensor([3, cols + 3])
    assert row_bounds(indices, rows, cols).tolist() == [0, 1, 2]
    assert row_bounds(torch.tensor([3, 9], dtype=torch.int32), rows, cols).tolist() == [0, 2, 2]


@pytest.mark.parametrize(
    "k, rows, cols, density_of_tiles, expected",
    [
        (167_772, 4096, 4096, 0.05, "compact"),
        (503_316, 4096, 4096, 0.9, "dense"),
        (1_000, 4096, 4096, 0.2, "entries"),
        (450_887, 11008, 4096, 0.06, "compact"),
    ],
)
def test_choice(k: int, rows: int, cols: int, density_of_tiles: float, expected: str) -> None:
    """Clear cases in bfloat16 at 2048 tokens, which do not depend on the exact constants of the cost model."""
    tiles = {shape: round(density_of_tiles * rows * cols / math.prod(shape)) for shape in TILE_SHAPES}
    problem = Problem(k, rows, cols, 2048, torch.bfloat16)
    assert choose_method(problem, tiles) == expected
    costs = estimate_costs(problem, tiles)
    assert set(costs) == set(PLANNED_METHODS) and min(costs.values()) > 0


def test_few_tiles_are_split_along_the_tokens() -> None:
    assert token_splits(tiles=1000, tokens=8192) == 1
    assert token_splits(tiles=200, tokens=8192) == 2
    assert token_splits(tiles=1, tokens=8192) == 16
    assert token_splits(tiles=1, tokens=64) == 1
    assert token_splits(tiles=0, tokens=0) == 1


def test_wide_tiles_are_taken_where_they_waste_little() -> None:
    problem = Problem(10**5, 4096, 4096, 2048, torch.bfloat16)
    model = CostModel()
    assert choose_tile_shape(problem, {(64, 64): 400, (128, 128): 100}, model) == (128, 128)
    assert choose_tile_shape(problem, {(64, 64): 400, (128, 128): 400}, model) == (64, 64)


def test_auto_takes_the_method_of_least_cost() -> None:
    indices = draw_clustered(256, 256, 600)
    never = {"half_flops": 1.0, "single_flops": 1.0}
    entries = plan_outer(indices, 256, 256, 64, torch.float32, model=CostModel(**never))
    assert entries.method == "entries"
    compact = plan_outer(indices, 256, 256, 64, torch.float32, model=CostModel(**never, cache_bandwidth=1e-3))
    assert compact.method == "compact"
    dense = plan_outer(indices, 256, 256, 64, torch.float32, model=CostModel(memory_bandwidth=1.0))
    assert dense.method == "dense"
    assert plan_outer(indices, 256, 256, 64, torch.float64).method == "dense"
    assert plan_outer(indices[:0], 256, 256, 64, torch.float32).method == "dense"


def test_bad_arguments_are_refused() -> None:
    indices = torch.arange(4)
    sizes = (2, 3, 4, torch.float32)
    with pytest.raises(ValueError, match="method must be one of auto, compact, dense, entries, got 'sampled'"):
        plan_outer(indices, *sizes, method="sampled")
    with pytest.raises(ValueError, match=r"indices must be one-dimensional, .* got torch.int64 of shape \(2, 2\)"):
        plan_outer(indices.view(2, 2), *sizes)
    with pytest.raises(ValueError, match="int32 or int64, got torch.float32"):
        plan_outer(indices.float(), *sizes)
    with pytest.raises(ValueError, match="rows and cols must be at least 1 and tokens at least 0, got 0, 3 and 4"):
        plan_outer(indices, 0, 3, 4, torch.float32)
    with pytest.raises(ValueError, match="unique positions in 1 x 3, got 4"):
        plan_outer(indices, 1, 3, 4, torch.float32)
    with pytest.raises(ValueError, match=r"tile_shape must be one of .*, got \(32, 32\)"):
        plan_outer(indices, *sizes, tile_shape=(32, 32))


def test_operands_of_another_plan_are_refused() -> None:
    indices = torch.arange(4)
    plan = plan_outer(indices, 2, 3, 4, torch.float32)
    a, b = torch.ones(4, 2), torch.ones(4, 3)
    with pytest.raises(ValueError, match="a and b must be"):
        gather_planned(a, b[:3], indices, plan)
    with pytest.raises(ValueError, match="the plan is for 2 x 3, but a and b have 3 and 2 columns"):
        gather_planned(b, a, indices, plan)
    with pytest.raises(ValueError, match=r"the plan is for 4 positions, got indices of shape \(3,\)"):
        gather_by_plan(a, b, indices[:3], plan)


def operands_and_plan(method: str) -> tuple[Tensor, Tensor, Tensor, OuterPlan]:
    indices = draw_clustered(70, 80, 60)
    return torch.randn(5, 70), torch.randn(5, 80), indices, plan_outer(indices, 70, 80, 5, torch.float32, method)


@pytest.mark.parametrize("method", PLANNED_METHODS)
def test_registered_operation(method: str) -> None:
    a, b, indices, plan = operands_and_plan(method)
    arguments = (a, b, indices, plan.method, plan.layout, plan.tensors)
    torch.library.opcheck(torch.ops.spiel_kernels.gather_planned.default, arguments)


@pytest.mark.parametrize("method", PLANNED_METHODS)
def test_compiles_in_one_graph(method: str) -> None:
    a, b, indices, plan = operands_and_plan(method)
    compiled = torch.compile(lambda a, b: 2 * gather_planned(a, b, indices, plan), backend="eager", fullgraph=True)
    assert torch.equal(compiled(a, b), 2 * gather_planned(a, b, indices, plan))


def test_plans_made_together_are_those_made_one_by_one() -> None:
    matrices = [
        (draw_clustered(rows, cols, k), rows, cols) for rows, cols, k in ((90, 70, 300), (128, 65, 40), (3, 9, 5))
    ]
    matrices.append((torch.empty(0, dtype=torch.int32), 4, 5))
    again = [(indices.clone(), rows, cols) for indices, rows, cols in matrices]
    assert all(known_plan(*matrix, torch.float32) is None for matrix in matrices)
    plan_together(matrices, torch.float32)
    for matrix, copy in zip(matrices, again, strict=True):
        together, alone = known_plan(*matrix, torch.float32), plan_for(*copy, torch.float32)
        assert (together.method, together.layout, together.k) == (alone.method, alone.layout, alone.k)
        assert all(torch.equal(*pair) for pair in zip(together.tensors, alone.tensors, strict=True))
        assert plan_for(*matrix, torch.float32) is together
    matrices[0][0].add_(1)
    assert known_plan(*matrices[0], torch.float32) is None
