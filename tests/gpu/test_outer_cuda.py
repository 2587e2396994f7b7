"""The gather of gradient entries on a GPU at the sizes of real layers: `pytest -m gpu`."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from spiel_kernels.gather import gather_planned
from spiel_kernels.outer_plan import TILE_SHAPES, CostModel, plan_outer
from spiel_kernels.outer_products import gather_by_plan, outer_block

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FORCED = [("compact", shape) for shape in TILE_SHAPES] + [("dense", None), ("entries", None)]
FORCED_IDS = [f"{method}-{shape[0]}x{shape[1]}" if shape else method for method, shape in FORCED]
# Tokens, rows, columns.
SIZES = [(2048, 1024, 4096), (1000, 4096, 1001), (4096, 333, 512)]


def draw_positions(rows: int, cols: int, density: float, clustered: bool) -> Tensor:
    """Sorted int32 positions, uniform or the largest entries of a matrix with heavy-tailed rows and columns."""
    k = round(density * rows * cols)
    scores = torch.rand(rows, cols, device="cuda")
    if clustered:
        row, col = torch.randn(rows, 1, device="cuda"), torch.randn(cols, device="cuda")
        scores = scores * row.mul(1.5).exp() * col.mul(1.5).exp()
    return scores.flatten().topk(k).indices.sort().values.to(torch.int32)


def operands(n: int, rows: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(n, rows, device="cuda").to(dtype), torch.randn(n, cols, device="cuda").to(dtype)


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method, shape", FORCED, ids=FORCED_IDS)
@pytest.mark.parametrize("n, rows, cols", SIZES)
@pytest.mark.parametrize("clustered", [True, False], ids=["clustered", "uniform"])
def test_gather(
    n: int, rows: int, cols: int, clustered: bool, method: str, shape: tuple[int, int] | None, dtype: torch.dtype
) -> None:
    a, b = operands(n, rows, cols, dtype)
    indices = draw_positions(rows, cols, 0.01, clustered)
    plan = plan_outer(indices, rows, cols, n, dtype, method, tile_shape=shape)
    got = gather_planned(a, b, indices, plan)
    expected = (a.double().T @ b.double()).flatten()[indices.long()]
    assert got.dtype == torch.float32
    assert (got - expected).norm() <= 3e-5 * expected.norm()


@pytest.mark.parametrize("method", ["compact", "dense", "entries"])
def test_equal_runs_give_equal_bits(method: str) -> None:
    a, b = operands(2048, 2048, 2048, torch.bfloat16)
    indices = draw_positions(2048, 2048, 0.02, clustered=True)
    results = []
    for _ in range(3):
        plan = plan_outer(indices, 2048, 2048, 2048, a.dtype, method)
        results.append(gather_planned(a, b, indices, plan))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_plans_do_not_depend_on_the_device() -> None:
    indices = draw_positions(1500, 1100, 0.01, clustered=True)
    for method in ("compact", "dense"):
        here, there = (plan_outer(i, 1500, 1100, 2048, torch.bfloat16, method) for i in (indices, indices.cpu()))
        assert here.layout == there.layout
        assert all(torch.equal(x.cpu(), y) for x, y in zip(here.tensors, there.tensors, strict=True))


@pytest.mark.parametrize("method, waits", [("auto", 1), ("compact", 1), ("dense", 1), ("entries", 0)])
def test_planning_waits_once_and_gathering_never(method: str, waits: int) -> None:
    a, b = operands(256, 512, 512, torch.bfloat16)
    indices = draw_positions(512, 512, 0.02, clustered=True)
    gather_planned(a, b, indices, plan_outer(indices, 512, 512, 256, a.dtype, method))  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plan = plan_outer(indices, 512, 512, 256, a.dtype, method)
        assert sum("synchroniz" in str(w.message) for w in caught) == waits
        torch.cuda.set_sync_debug_mode("error")
        gather_planned(a, b, indices, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", ["compact", "dense", "entries"])
def test_no_dense_product_is_held(method: str) -> None:
    rows, cols, n = 8192, 8192, 512
    a, b = operands(n, rows, cols, torch.bfloat16)
    indices = draw_positions(rows, cols, 0.005, clustered=True)
    plan = plan_outer(indices, rows, cols, n, a.dtype, method)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = gather_planned(a, b, indices, plan)
    extra = torch.cuda.max_memory_allocated() - before
    copies = a.nbytes + b.nbytes
    assert extra <= copies + got.nbytes + (64 << 20) < 4 * rows * cols


def test_plan_holds_few_bytes_per_position() -> None:
    indices = draw_positions(4096, 4096, 0.01, clustered=True)
    plan = plan_outer(indices, 4096, 4096, 2048, torch.bfloat16, "compact")
    assert plan.nbytes < 0.1 * indices.nbytes
    assert plan.product_share < 0.12


def test_forty_thousand_columns_and_a_wide_vocabulary() -> None:
    """Row and column numbers beyond int16, and int64 positions beyond 2**31."""
    n, rows, cols = 64, 70_000, 33_000
    a, b = operands(n, rows, cols, torch.bfloat16)
    indices = torch.randint(rows * cols, (50_000,), device="cuda").unique()
    for method in ("compact", "entries", "dense"):
        plan = plan_outer(indices, rows, cols, n, a.dtype, method, model=CostModel())
        got = gather_planned(a, b, indices, plan)
        expected = (a.double()[:, indices // cols] * b.double()[:, indices % cols]).sum(0)
        assert (got - expected).norm() <= 3e-5 * expected.norm()


def test_half_precision_blocks_are_not_rounded() -> None:
    """`torch.mm` sums into float32: the entry would be inf in float16 and off by 2**-9 in bfloat16."""
    for dtype in (torch.float16, torch.bfloat16):
        a, b = torch.full((512, 16), 16.0, device="cuda", dtype=dtype), torch.full((512, 24), 16.0).to("cuda", dtype)
        a[0, 0] = 1.0
        block = outer_block(a, b)
        assert block.dtype == torch.float32
        assert block[0, 0] == 511 * 256 + 16 and block[1, 1] == 512 * 256


def test_tf32_where_it_is_allowed() -> None:
    a, b = operands(512, 256, 256, torch.float32)
    indices = draw_positions(256, 256, 0.05, clustered=False)
    plan = plan_outer(indices, 256, 256, 512, a.dtype, "compact")
    exact = gather_by_plan(a.double(), b.double(), indices, plan)
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        error = (gather_planned(a, b, indices, plan) - exact).norm() / exact.norm()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert error < 2e-3


@pytest.mark.parametrize("method", ["compact", "entries"])
def test_compiled_graphs_hold_the_gather(method: str) -> None:
    a, b = operands(128, 256, 256, torch.bfloat16)
    indices = draw_positions(256, 256, 0.05, clustered=True)
    plan = plan_outer(indices, 256, 256, 128, a.dtype, method)
    compiled = torch.compile(lambda a, b: 2 * gather_planned(a, b, indices, plan), fullgraph=True)
    assert torch.equal(compiled(a, b), 2 * gather_planned(a, b, indices, plan))
