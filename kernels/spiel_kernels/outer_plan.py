"""Plans how selected entries of ``a.T @ b`` are gathered, once per index set. A plan is plain data.

Positions that were picked by gradient concentrate: rows sorted by how many positions they hold and taken 64 at a time
touch few columns. The compact method multiplies only these columns. Worked example, a 4 x 6 matrix in blocks of two
rows and tiles of two columns, the entries marked x selected::

    row 0  . . . x . .      rows by count: 2 1 0 3        block 0 = rows 2, 1: columns 0 1 3 4
    row 1  x . . x . .      (equal counts: in order)      block 1 = rows 0, 3: column  3
    row 2  x x . . x .
    row 3  . . . . . .      tiles: block 0 [0 1], block 0 [3 4], block 1 [3 5]      (5 fills up)

Three of six possible tiles are computed. The position of an entry in its tile follows from the rank of its row and a
binary search for its column, so that a plan holds nothing per entry: 2 or 4 bytes per column of a tile and per row of
the matrix, twice for rows (`OuterPlan.nbytes`; about 0.2 bytes per position at 1% of 4096 x 4096).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from .index_set import PerIndexSet, row_bounds_of

# Rows and columns of a tile. A wide tile reads fewer bytes per product, a narrow one leaves fewer products unused.
TILE_SHAPES = ((64, 64), (64, 128), (128, 128))
# Entries of the float32 row block that the dense method holds at a time: 16 MiB, a third of an H100's L2 cache.
DENSE_BLOCK_ENTRIES = 1 << 22
# Tiles that keep an H100 busy, two on each multiprocessor; a product of fewer is split along the tokens. A constant, so
# that the order of summation does not depend on the device.
BUSY_PROGRAMS = 2 * 132
TOKENS_PER_SPLIT = 512


# The cost of a gather on a GPU is estimated for three methods. "compact": matrix products over the columns that a block
# of rows touches. "dense": all columns. "entries": a dot product per entry.


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
    # A multiple of the tiles of the library's matrix product, where the block is large enough for that to matter.
    return max(1, min(rows, fit - fit % 128 if fit > 128 else fit))


def token_splits(tiles: int, tokens: int) -> int:
    """Into how many runs of tokens a product of `tiles` tiles is cut; the runs are summed in the end."""
    return max(1, min(math.ceil(BUSY_PROGRAMS / max(1, tiles)), tokens // TOKENS_PER_SPLIT))


def _copies(problem: Problem, model: CostModel) -> float:
    # Both operands are read and written once, so that a row of the copy holds the tokens of one column.
    size = problem.dtype.itemsize * problem.tokens * (problem.rows + problem.cols)
    return 2 * size / model.memory_bandwidth + 2 * model.launch


def _picking(problem: Problem, model: CostModel, splits: int = 1) -> float:
    # An index in, a value out, and a 32-byte sector around each partial sum.
    return problem.k * (4 + 4 + 32 * splits) / model.cache_bandwidth + model.launch


def dense_seconds(problem: Problem, model: CostModel) -> float:
    """Estimated time of the dense method: all tiles of the product, each written to the cache and read from there."""
    area = problem.rows * problem.cols
    products = 2 * area * problem.tokens / (model.tile_efficiency * model.flops(problem.dtype))
    return products + 4 * area / model.cache_bandwidth + _picking(problem, model)


def entries_seconds(problem: Problem, model: CostModel) -> float:
    """Estimated time of the entries method, which reads two columns per entry."""
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
    """The method of least estimated cost."""
    costs = estimate_costs(problem, tiles, model)
    return min(costs, key=lambda method: costs[method])


PLANNED_METHODS = ("compact", "dense", "entries")
# Rows of a block, ascending; all are multiples of the first.
_HEIGHTS = sorted({high for high, _ in TILE_SHAPES})
_FINE, _COARSE = _HEIGHTS[0], _HEIGHTS[-1]


class Tiles(NamedTuple):
    """Rows and columns that the compact method multiplies. "Narrow" is int16 where the numbers fit, else int32.

    A block is a number of rows that stand together in `row_order`. Its active columns, ascending, are cut into tiles;
    the last tile of a block is filled up with the matrix's last column.
    """

    row_order: Tensor  # narrow [blocks * tile rows]: row numbers by falling count; the last one repeated
    row_rank: Tensor  # narrow [rows]: place of a row in row_order
    first_tile: Tensor  # int32 [blocks + 1]: number of the block's first tile
    block: Tensor  # narrow [tiles]: the block of a tile
    columns: Tensor  # narrow [tiles * tile columns]: column numbers


@dataclass(frozen=True)
class OuterPlan:
    """How the entries of one index set are gathered, from `plan_outer`.

    Args:
        method: "compact", "dense" or "entries".
        rows: size of the matrix; cols: the same.
        k: how many positions the plan is for.
        layout: compact: rows and columns of a tile; else empty.
        tensors: compact: a `Tiles`; else empty.
    """

    method: str
    rows: int
    cols: int
    k: int
    layout: tuple[int, ...] = ()
    tensors: tuple[Tensor, ...] = ()

    @property
    def tiles(self) -> Tiles:
        return Tiles(*self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes that the plan's tensors hold."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def product_share(self) -> float:
        """Multiplications of the method as a share of the dense product's."""
        if self.method == "compact":
            return self.tiles.block.numel() * math.prod(self.layout) / (self.rows * self.cols)
        return 1.0 if self.method == "dense" else self.k / (self.rows * self.cols)


def _check(indices: Tensor, rows: int, cols: int, tokens: int, method: str, tile_shape: tuple[int, int] | None) -> None:
    if method not in ("auto", *PLANNED_METHODS):
        raise ValueError(f"method must be one of auto, {', '.join(PLANNED_METHODS)}, got {method!r}")
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"indices must be one-dimensional, int32 or int64, got {indices.dtype} of shape {tuple(indices.shape)}"
        )
    if rows < 1 or cols < 1 or tokens < 0:
        raise ValueError(f"rows and cols must be at least 1 and tokens at least 0, got {rows}, {cols} and {tokens}")
    if indices.numel() > rows * cols:
        raise ValueError(f"indices must be unique positions in {rows} x {cols}, got {indices.numel()} of them")
    if tile_shape is not None and tile_shape not in TILE_SHAPES:
        raise ValueError(f"tile_shape must be one of {TILE_SHAPES}, got {tile_shape}")


def plan_outer(
    indices: Tensor,
    rows: int,
    cols: int,
    tokens: int,
    dtype: torch.dtype,
    method: str = "auto",
    *,
    tile_shape: tuple[int, int] | None = None,
    model: CostModel | None = None,
) -> OuterPlan:
    """Decide how the entries at `indices` of a product ``a.T @ b`` are gathered.

    The plan depends on the arguments alone, so that equal runs make equal plans. Waits for the device once ("dense" and
    "entries": never).

    Args:
        indices: int32 or int64 ``[k]``, sorted and unique flat positions in ``[rows, cols]``.
        rows: columns of a, at least 1; cols: columns of b, at least 1.
        tokens: rows that a and b are expected to have; it matters for the choice only.
        dtype: dtype of a and b (the wider one if they differ).
        method: "auto" takes the one of least estimated cost on a GPU; float64 operands, for which there are no GPU
            kernels, get "dense".
        tile_shape: rows and columns of a tile of the compact method, one of `TILE_SHAPES`; by estimated cost if None.
        model: rates of the device, from which costs are estimated.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    draft = _Draft(indices, rows, cols, tokens, dtype, method, tile_shape, model)
    return draft.plan(iter(draft.active_counts().tolist() if draft.needs_counts else []))


class _Draft:
    """A plan in the making: how many columns are active is known to the device before it is known to the host.

    Args: see `plan_outer`.
    """

    def __init__(
        self,
        indices: Tensor,
        rows: int,
        cols: int,
        tokens: int,
        dtype: torch.dtype,
        method: str = "auto",
        tile_shape: tuple[int, int] | None = None,
        model: CostModel | None = None,
    ) -> None:
        _check(indices, rows, cols, tokens, method, tile_shape)
        self.indices, self.rows, self.cols = indices, rows, cols
        self.problem, self.model = Problem(indices.numel(), rows, cols, tokens, dtype), model or CostModel()
        self.method = "dense" if method == "auto" and (indices.numel() == 0 or dtype == torch.float64) else method
        self.shapes = TILE_SHAPES if tile_shape is None else (tile_shape,)

    @property
    def needs_counts(self) -> bool:
        return self.method in ("auto", "compact")

    def active_counts(self) -> Tensor:
        """int64, on the device: active columns of each row block, for the heights of tiles in turn."""
        blocks = _RowBlocks.build(self.indices, self.rows, self.cols)
        return torch.cat([blocks.active_columns(high).sum(1) for high in _HEIGHTS])

    def plan(self, host: Iterator[int]) -> OuterPlan:
        """The plan, given the `active_counts` if it needs them. Does not wait for the device."""
        counts = self._tile_counts(host) if self.needs_counts else {}
        method = choose_method(self.problem, counts, self.model) if self.method == "auto" else self.method
        if method != "compact":
            return OuterPlan(method, self.rows, self.cols, self.problem.k)
        shape = choose_tile_shape(self.problem, counts, self.model)
        # Built again, as drafts of many matrices would hold too much until their counts are known.
        tiles = _RowBlocks.build(self.indices, self.rows, self.cols).tiles(shape, counts[shape])
        return OuterPlan(method, self.rows, self.cols, self.problem.k, shape, tuple(tiles))

    def _tile_counts(self, host: Iterator[int]) -> dict[tuple[int, int], int]:
        """How many tiles of each shape hold all positions."""
        by_height = {high: list(islice(host, _blocks(self.rows, high))) for high in _HEIGHTS}
        return {(high, wide): sum(-(-count // wide) for count in by_height[high]) for high, wide in self.shapes}


# The number of tokens that plans are made for. It does not depend on the batch: a resumed run must choose as the run
# that it continues did.
NOMINAL_TOKENS = 2048

_plans: PerIndexSet[OuterPlan] = PerIndexSet()


def plan_for(indices: Tensor, rows: int, cols: int, dtype: torch.dtype, method: str = "auto") -> OuterPlan:
    """The plan for an index set, made once per cycle and used in every backward pass.

    It is remembered as `PerIndexSet` says.

    Args:
        indices: ``[k]`` sorted, unique flat positions in ``[rows, cols]``.
        dtype: of the operands, the wider one if they differ.
        method: "auto", "compact", "dense" or "entries".
    """
    key = (rows, cols, dtype, method)
    return _plans.get(indices, key, lambda: plan_outer(indices, rows, cols, NOMINAL_TOKENS, dtype, method))


def known_plan(indices: Tensor, rows: int, cols: int, dtype: torch.dtype) -> OuterPlan | None:
    """What `plan_for` would give, if that takes no wait for the device; else None."""
    return _plans.known(indices, (rows, cols, dtype, "auto"))


def plan_together(matrices: Sequence[tuple[Tensor, int, int]], dtype: torch.dtype) -> None:
    """Make the plans of many index sets, those that are not known yet, and wait for the device once.

    Args:
        matrices: an index set on the device, rows and columns of each.
        dtype: of the operands.
    """
    missing = [matrix for matrix in matrices if known_plan(*matrix, dtype) is None and not matrix[0].is_inference()]
    drafts = [_Draft(indices, rows, cols, NOMINAL_TOKENS, dtype) for indices, rows, cols in missing]
    counted = [draft.active_counts() for draft in drafts if draft.needs_counts]
    host = iter(torch.cat(counted).tolist() if counted else [])
    for draft in drafts:
        _plans.keep(draft.indices, (draft.rows, draft.cols, dtype, "auto"), draft.plan(host))


def narrow_dtype(count: int) -> torch.dtype:
    """The narrowest of int16 and int32 for numbers below `count`."""
    return torch.int16 if count <= 2**15 else torch.int32


def _blocks(rows: int, high: int) -> int:
    """Blocks of `high` rows, of which a matrix of `rows` rows is given as many as its coarsest blocks hold."""
    return math.ceil(rows / _COARSE) * (_COARSE // high)


@dataclass(frozen=True)
class _RowBlocks:
    """An index set sorted into row blocks, on its device.

    Args:
        order: int64 ``[rows]``, row numbers by falling count; rank: its inverse.
        active: bool ``[blocks of the finest size, cols]``, the columns that a block's positions touch.
    """

    order: Tensor
    rank: Tensor
    active: Tensor

    @staticmethod
    def build(positions: Tensor, rows: int, cols: int) -> _RowBlocks:
        device = positions.device
        counts = row_bounds_of(positions, rows, cols).diff()
        # Stable, so that equal index sets make equal plans on every device.
        order = torch.argsort(counts, descending=True, stable=True)
        number = torch.arange(rows, device=device)
        rank = torch.empty_like(order).scatter_(0, order, number)
        # The entries of a row move together, from the row to its block.
        moved = torch.div(rank, _FINE, rounding_mode="floor").sub_(number).mul_(cols)
        places = torch.repeat_interleave(moved, counts, output_size=positions.numel()).add_(positions)
        active = torch.zeros(_blocks(rows, _FINE) * cols, dtype=torch.bool, device=device)
        active.index_fill_(0, places, True)
        return _RowBlocks(order, rank, active.view(-1, cols))

    def active_columns(self, high: int) -> Tensor:
        """bool ``[blocks of `high` rows, cols]``."""
        return self.active if high == _FINE else self.active.view(-1, high // _FINE, self.active.shape[1]).any(1)

    def tiles(self, shape: tuple[int, int], total: int) -> Tiles:
        """The `total` tiles of a shape."""
        high, wide = shape
        rows, cols, device = self.order.numel(), self.active.shape[1], self.order.device
        active = self.active_columns(high)
        # The place of every active column among the active columns of its block.
        lane = active.cumsum(1, dtype=torch.int32)
        per_block = torch.div(lane[:, -1] + (wide - 1), wide, rounding_mode="floor")
        blocks = per_block.numel()
        first = torch.zeros(blocks + 1, dtype=torch.int64, device=device)
        torch.cumsum(per_block, 0, out=first[1:])
        slots = torch.add(lane, first[:-1, None], alpha=wide).sub_(1)
        # The last entry takes the columns that are not active.
        slots = torch.where(active, slots, total * wide)
        columns = torch.full((total * wide + 1,), cols - 1, dtype=narrow_dtype(cols), device=device)
        numbers = torch.arange(cols, dtype=columns.dtype, device=device)
        columns.scatter_(0, slots.view(-1), numbers.repeat(blocks))
        filler = self.order[-1:].expand(blocks * high - rows)
        return Tiles(
            row_order=torch.cat([self.order, filler]).to(narrow_dtype(rows)),
            row_rank=self.rank.to(narrow_dtype(rows)),
            first_tile=first.to(torch.int32),
            block=torch.repeat_interleave(
                torch.arange(blocks, dtype=narrow_dtype(blocks), device=device), per_block, output_size=total
            ),
            columns=columns[: total * wide],
        )
