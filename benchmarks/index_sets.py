"""Draws index sets that are as concentrated as those of real training, from profiles of a trained model's gradients.

A profile says how the largest entries of a weight gradient are spread over rows and columns: it lists the counts per
row and per column, in descending order. A few rows and columns have most of the entries. `python -m benchmarks profile`
measures profiles; `ProfileSampler` draws index sets of any shape and density from them. The model: entry (i, j) is
chosen with probability ``1 - exp(-row[i] * col[j])``. The weights `row` and `col` are fitted to the measured profile.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spiel_kernels import index_dtype, sample_positions

from .environment import RESULTS, load

PROFILE = "profile_smollm2"
INDEX_SETS = ("profile", "uniform")
BINS = 24
_SMALLEST_BIN = 1 / 512
_FIT_ROUNDS = 1500


def bin_edges() -> Tensor:
    """Edges of the bins, ``[BINS + 1]`` ranks from 0 (the row with most entries) to 1; the first bins are narrow."""
    edges = torch.logspace(math.log10(_SMALLEST_BIN), 0, BINS, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), edges])


def profile_of(counts: Tensor) -> Tensor:
    """Compute the profile of rows (or columns) from the number of entries in each.

    Args:
        counts: ``[n]``, entries per row, in any order.

    Returns:
        ``[BINS]`` float64: mean count in each bin of rows sorted by count, over the mean count of all rows.
    """
    n = counts.numel()
    ordered = counts.to(torch.float64).sort(descending=True).values
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), ordered.cumsum(0)])
    places = bin_edges() * n
    low = places.floor().to(torch.int64).clamp(max=n - 1)
    below = sums[low] + (places - low) * (sums[low + 1] - sums[low])
    return below.diff() / places.diff() / ordered.mean()


@dataclass(frozen=True)
class Profile:
    """Measured profile of one type of module.

    Attributes:
        rows, cols: ``[BINS]`` as `profile_of` returns them.
        density: share of the entries that were counted.
    """

    rows: tuple[float, ...]
    cols: tuple[float, ...]
    density: float

    @staticmethod
    def from_json(entry: dict[str, Any]) -> Profile:
        return Profile(tuple(entry["rows"]), tuple(entry["cols"]), float(entry["density"]))


@functools.lru_cache(maxsize=64)
def fitted_weights(profile: Profile) -> tuple[Tensor, Tensor]:
    """Fit the weights of rows and of columns, ``[BINS]`` each, to a profile."""
    widths = bin_edges().diff()
    row_shares = (torch.tensor(profile.rows, dtype=torch.float64) * profile.density).clamp_min(1e-9)
    col_shares = (torch.tensor(profile.cols, dtype=torch.float64) * profile.density).clamp_min(1e-9)
    rows, cols = row_shares.sqrt(), col_shares.sqrt()
    for _ in range(_FIT_ROUNDS):
        rows = rows * (row_shares / (-torch.expm1(-rows[:, None] * cols) @ widths)).pow(0.7)
        cols = cols * (col_shares / (widths @ -torch.expm1(-rows[:, None] * cols))).pow(0.7)
    return rows, cols


def spread_over(weights: Tensor, n: int) -> Tensor:
    """Interpolate the weights ``[BINS]`` of bins to ``[n]`` weights of rows, largest first (log-linear)."""
    edges = bin_edges()
    centres = (edges[1:] * edges[:-1].clamp_min(edges[1] / 4)).sqrt().log()
    ranks = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).log().clamp(centres[0], centres[-1])
    right = torch.searchsorted(centres, ranks).clamp(1, BINS - 1)
    share = (ranks - centres[right - 1]) / (centres[right] - centres[right - 1])
    logs = weights.clamp_min(1e-12).log()
    return ((1 - share) * logs[right - 1] + share * logs[right]).exp()


def draw_positions(profile: Profile, rows: int, cols: int, k: int, seed: int, device: Any = "cpu") -> Tensor:
    """Draw an index set with the profile's concentration; it is random which rows and columns have most positions.

    Args:
        rows, cols: of the weight; k: number of positions, ``0 <= k <= rows * cols``.
        seed: the same seed gives the same positions on the same kind of device.

    Returns:
        ``[k]`` sorted, unique flat positions in the dtype of index sets, on `device`.
    """
    numel = rows * cols
    if not 0 <= k <= numel:
        raise ValueError(f"k must be between 0 and rows * cols={numel}, got {k}")
    row_weights, col_weights = fitted_weights(profile)
    generator = torch.Generator().manual_seed(seed)
    row = spread_over(row_weights, rows)[torch.randperm(rows, generator=generator)]
    col = spread_over(col_weights, cols)[torch.randperm(cols, generator=generator)]
    # Each entry gets an exponential time with its rate; the k shortest times are a weighted draw without replacement.
    race = torch.empty(rows, cols, dtype=torch.float32, device=device)
    race.exponential_(generator=torch.Generator(device=device).manual_seed(seed))
    race.log_().sub_(row.log().to(race)[:, None]).sub_(col.log().to(race))
    chosen = torch.topk(race.flatten(), k, largest=False, sorted=False).indices
    return chosen.sort().values.to(index_dtype(numel))


class ProfileSampler:
    """Draws index sets for modules; the end of a module's name (``q_proj``, ``down_proj``, ...) selects the profile."""

    def __init__(self, profiles: dict[str, Profile]) -> None:
        if not profiles:
            raise ValueError("no profiles; measure them with `python -m benchmarks profile`")
        self.profiles = profiles

    @staticmethod
    def measured() -> ProfileSampler:
        """Sampler with the profiles in benchmarks/results."""
        result = load(PROFILE, RESULTS)
        if result is None:
            raise FileNotFoundError(f"{RESULTS / PROFILE}.json is missing: run `python -m benchmarks profile`")
        return ProfileSampler({name: Profile.from_json(entry) for name, entry in result["modules"].items()})

    def profile(self, module_name: str) -> Profile:
        kind = module_name.rpartition(".")[2]
        return self.profiles.get(kind) or next(iter(self.profiles.values()))

    def draw(self, module_name: str, rows: int, cols: int, k: int, seed: int, device: Any = "cpu") -> Tensor:
        return draw_positions(self.profile(module_name), rows, cols, k, seed, device)


def module_type(rows: int, cols: int) -> str:
    """Type of module whose profile is used for a weight of this shape."""
    if rows > cols:
        return "up_proj"
    if rows < cols:
        return "down_proj" if cols % rows else "k_proj"
    return "q_proj"


def draw_index_set(kind: str, rows: int, cols: int, k: int, seed: int, device: Any = "cpu") -> Tensor:
    """Draw a "profile" or "uniform" index set for a weight of this shape, on `device`."""
    if kind == "profile":
        return ProfileSampler.measured().draw(module_type(rows, cols), rows, cols, k, seed, device)
    if kind != "uniform":
        raise ValueError(f"index set must be one of {', '.join(INDEX_SETS)}, got {kind!r}")
    positions = sample_positions(rows * cols, k, torch.Generator().manual_seed(seed))
    return positions.to(device=device, dtype=index_dtype(rows * cols))


def block_share(indices: Tensor, rows: int, cols: int, block: int = 64) -> float:
    """Share of the dense product that is left if each block of rows skips the columns without positions.

    Rows are sorted by their number of positions before they are divided into blocks.
    """
    row = torch.div(indices.to(torch.int64), cols, rounding_mode="floor")
    col = indices.to(torch.int64) - row * cols
    order = torch.bincount(row, minlength=rows).argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(rows, device=order.device)
    touched = torch.unique(torch.div(rank[row], block, rounding_mode="floor") * cols + col).numel()
    return touched * block / (rows * cols)
