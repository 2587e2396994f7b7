"""What a gather of gradient entries costs on a GPU, by method; pure arithmetic.

The methods are those of `outer_plan`: "compact" (matrix products over the columns that a block of rows touches),
"dense" (all columns, in row blocks) and "entries" (a dot product per entry).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# Rows and columns of a tile. A wide tile reads fewer bytes per product, a narrow one leaves fewer products unused.
TILE_SHAPES = ((64, 64), (64, 128), (128, 128))
# Entries of the float32 row block that the dense method holds at a time: 16 MiB, a third of an H100's L2 cache.
DENSE_BLOCK_ENTRIES = 1 << 22
# Tiles that keep an H100 busy, two on each multiprocessor; a product of fewer is split along the tokens. A constant, so
# that the order of summation does not depend on the device.
BUSY_PROGRAMS = 2 * 132
TOKENS_PER_SPLIT = 512


@dataclass(frozen=True)
class CostModel:
    """Rates of a device. The defaults are reasoned from an H100's data sheet, not yet measured.

    ``python -m benchmarks ops`` prints what to put here.

    Args:
        half_flops: FLOP/s of a large matrix product in bfloat16 or float16.
        single_flops: the same in float32 (without TF32).
        tile_efficiency: share of that rate which a tile kernel reaches when its operands arrive in time.
        cache_bandwidth: bytes/s that all multiprocessors together read from L2, in rows of 128 bytes.
        memory_bandwidth: bytes/s of a transposing copy, reads and writes together.
        launch: seconds that a kernel in a queue adds to its own work.
    """

    half_flops: float = 6e14
    single_flops: float = 4.5e13
    tile_efficiency: float = 0.6
    cache_bandwidth: float = 4.2e12
    memory_bandwidth: float = 2.2e12
    launch: float = 2e-6

    def flops(self, dtype: torch.dtype) -> float:
        return self.half_flops if dtype.itemsize == 2 else self.single_flops


@dataclass(frozen=True)
class Problem:
    """One gather: `k` entries of ``a.T @ b`` with a ``[tokens, rows]`` and b ``[tokens, cols]``, both of `dtype`."""

    k: int
    rows: int
    cols: int
    tokens: int
    dtype: torch.dtype


def dense_block_rows(rows: int, cols: int) -> int:
    """Rows of the block that the dense method holds at a time."""
    fit = DENSE_BLOCK_ENTRIES // max(1, cols)
    # Whole tiles of the library's matrix product, where the matrix is large enough for that to matter.
    return max(1, min(rows, fit - fit % 128 if fit > 128 else fit))


def token_splits(tiles: int, tokens: int) -> int:
    """Into how many runs of tokens, summed in the end, a product of `tiles` tiles is cut."""
    return max(1, min(math.ceil(BUSY_PROGRAMS / max(1, tiles)), tokens // TOKENS_PER_SPLIT))


def _copies(problem: Problem, model: CostModel) -> float:
    # Both operands are read and written once, so that a row of the copy holds the tokens of one column.
    size = problem.dtype.itemsize * problem.tokens * (problem.rows + problem.cols)
    return 2 * size / model.memory_bandwidth + 2 * model.launch


def _picking(problem: Problem, model: CostModel, splits: int = 1) -> float:
    # An index in, a value out, and a 32-byte sector around each partial sum.
    return problem.k * (4 + 4 + 32 * splits) / model.cache_bandwidth + model.launch


def dense_seconds(problem: Problem, model: CostModel) -> float:
    """Row blocks of the whole product, each followed by the gather of its entries."""
    area = problem.rows * problem.cols
    blocks = math.ceil(problem.rows / dense_block_rows(problem.rows, problem.cols))
    products = 2 * area * problem.tokens / model.flops(problem.dtype) + 4 * area / model.cache_bandwidth
    return products + _picking(problem, model) + 3 * blocks * model.launch


def entries_seconds(problem: Problem, model: CostModel) -> float:
    """Two columns read per entry."""
    read = 2 * problem.k * problem.tokens * problem.dtype.itemsize
    return _copies(problem, model) + read / model.cache_bandwidth + model.launch


def compact_seconds(problem: Problem, shape: tuple[int, int], tiles: int, model: CostModel) -> float:
    """Products of `tiles` tiles, whole, then the gather of their entries."""
    high, wide = shape
    splits = token_splits(tiles, problem.tokens)
    products = 2 * high * wide * problem.tokens / (model.tile_efficiency * model.flops(problem.dtype))
    read = (high + wide) * problem.tokens * problem.dtype.itemsize / model.cache_bandwidth
    write = 4 * high * wide * splits / model.cache_bandwidth
    tiled = tiles * (max(products, read) + write) + model.launch
    return _copies(problem, model) + tiled + _picking(problem, model, splits)


def choose_tile_shape(problem: Problem, tiles: Mapping[tuple[int, int], int], model: CostModel) -> tuple[int, int]:
    """The shape whose tiles cost least.

    Args:
        tiles: shape -> how many tiles of it the entries need.
    """
    return min(tiles, key=lambda shape: compact_seconds(problem, shape, tiles[shape], model))


def estimate_costs(
    problem: Problem, tiles: Mapping[tuple[int, int], int], model: CostModel | None = None
) -> dict[str, float]:
    """Seconds per gather by method.

    Args:
        tiles: shape -> how many tiles of it the entries need; not empty.
        model: rates of the device; an H100's by default.
    """
    model = model or CostModel()
    shape = choose_tile_shape(problem, tiles, model)
    return {
        "compact": compact_seconds(problem, shape, tiles[shape], model),
        "dense": dense_seconds(problem, model),
        "entries": entries_seconds(problem, model),
    }


def choose_method(problem: Problem, tiles: Mapping[tuple[int, int], int], model: CostModel | None = None) -> str:
    """The method of least cost."""
    costs = estimate_costs(problem, tiles, model)
    return min(costs, key=lambda method: costs[method])
