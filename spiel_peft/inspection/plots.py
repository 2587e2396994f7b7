"""Pictures of an adapter: where its deltas are, their sizes, one matrix as a map; closes and losses of its run."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files.adapter_file import StoredDelta
from ..files.folder import clear_leftovers, work_folder
from ..files.tensors import Progress
from .facts import AdapterFacts, Close, Losses, ModuleFacts

DPI = 130
# Most cells of the map along each side.
_CELLS = 200
_BINS = 120
# The histogram spans at most this many powers of ten; smaller deltas are in its first bin.
_DECADES = 8.0
_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


def place_of(module: str) -> tuple[int | None, str]:
    """The number of the layer a module is in (None outside of layers), and its name there.

    Further numbers, as those of experts, become ``*``: such modules share a cell of the pictures.
    """
    match = _NUMBER.search(module)
    if match is None:
        return None, module.rpartition(".")[2]
    inside = module[match.end() :]
    return int(match[1]), ".".join("*" if part.isdigit() else part for part in inside.split("."))


def density_figure(facts: AdapterFacts) -> Figure:
    """Layer by module: density (number of deltas where shapes are not known), and mean absolute delta."""
    cells: dict[tuple[int | None, str], list[ModuleFacts]] = {}
    for module in facts.modules:
        cells.setdefault(place_of(module.module), []).append(module)
    numbered = sorted({layer for layer, _ in cells if layer is not None})
    rows = [*numbered, *([None] if any(layer is None for layer, _ in cells) else [])]
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    known = facts.weights is not None
    panels = [
        ("density (%)" if known else "deltas", _share if known else _count),
        ("mean |delta|", _mean_abs),
    ]
    size = (3.0 + 1.1 * len(kinds), max(3.5, 1.8 + 0.2 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    for ax, (title, measure) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        grid = np.full((len(rows), len(kinds)), np.nan)
        for (layer, kind), modules in cells.items():
            grid[rows.index(layer), kinds.index(kind)] = measure(modules)
        image = ax.imshow(grid, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
        ax.set_title(title, fontsize=10)
        ax.set_xticks(range(len(kinds)), [kind.removesuffix("_proj") for kind in kinds], rotation=60, ha="right")
        figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02)
    every = max(1, len(rows) // 15)
    labels = ["-" if row is None else str(row) for row in rows]
    figure.axes[0].set_yticks(range(0, len(rows), every), labels[::every])
    figure.axes[0].set_ylabel("layer")
    overall = f", {facts.density:.2%} of the adapted weights" if facts.density is not None else ""
    figure.suptitle(f"{facts.deltas:,} deltas in {len(facts.modules)} modules{overall}", fontsize=11)
    return figure


def _share(modules: Sequence[ModuleFacts]) -> float:
    return 100 * _count(modules) / sum(module.weights or 0 for module in modules)


def _count(modules: Sequence[ModuleFacts]) -> float:
    return float(sum(module.deltas for module in modules))


def _mean_abs(modules: Sequence[ModuleFacts]) -> float:
    return sum(module.mean_abs * module.deltas for module in modules) / max(1.0, _count(modules))


def histogram_figure(facts: AdapterFacts) -> Figure:
    """Histogram of the deltas' absolute values on a logarithmic axis, negative and positive deltas apart."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    values = np.concatenate([delta.values.double().numpy() for delta in facts.adapter.deltas.values()])
    finite = values[np.isfinite(values)]
    sized = finite[finite != 0]
    # Everything is done with exponents of ten, and clipped into the range of the bins: no delta falls out of them.
    exponents = np.log10(np.abs(sized))
    highest = min(float(exponents.max()), 307.0) if sized.size else -7.0  # no edge of a bin overflows
    lowest = max(float(exponents.min()) if sized.size else -8.0, highest - _DECADES)
    bounds = np.linspace(min(lowest, highest - 1.0), highest, _BINS + 1)
    for sign, colour, label in ((-1, "tab:red", "negative"), (1, "tab:blue", "positive")):
        counts = np.histogram(exponents[np.sign(sized) == sign].clip(bounds[0], bounds[-1]), bounds)[0]
        ax.stairs(counts, 10.0**bounds, color=colour, fill=True, alpha=0.45, label=f"{label}: {int(counts.sum()):,}")
    mean = float((np.abs(finite) / max(1, len(finite))).sum())
    ax.axvline(max(mean, 10.0 ** bounds[0]), color="0.3", linestyle="--", label=f"mean |delta| {mean:.2e}")
    others = len(values) - len(finite)
    odd = f", {others:,} NaN or infinite (in no bin)" if others else ""
    title = f"{len(values):,} deltas, {len(finite) - len(sized):,} of them zero{odd}"
    ax.set(xscale="log", xlabel="|delta|", ylabel="deltas", title=title)
    ax.legend(fontsize=9)
    return figure


def matrix_figure(module: ModuleFacts, delta: StoredDelta) -> Figure:
    """A map of one weight: the sum of the absolute deltas in each cell, with sums by row and by column beside it.

    Raises:
        ValueError: the weight's shape is not known.
    """
    if module.rows is None:
        raise ValueError(f"the shape of {module.module}'s weight is not known: name the base model with --base")
    rows, columns = module.rows, module.weights // module.rows
    height, width = min(rows, _CELLS), min(columns, _CELLS)
    positions = delta.indices.long()
    down, across = positions // columns * height // rows, positions % columns * width // columns
    mass = torch.zeros(height * width, dtype=torch.float64)
    mass.index_add_(0, down * width + across, delta.values.double().abs())
    grid = mass.view(height, width).numpy()
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, width_ratios=(5, 1), height_ratios=(1, 5), sharex="col", sharey="row")
    image = axes[1, 0].imshow(grid, aspect="auto", cmap="magma", extent=(0, columns, rows, 0), interpolation="nearest")
    axes[1, 0].set(xlabel="column", ylabel="row")
    axes[0, 0].stairs(grid.sum(0), np.linspace(0, columns, width + 1), fill=True, color="tab:purple")
    beside = {"orientation": "horizontal", "fill": True, "color": "tab:purple"}
    axes[1, 1].stairs(grid.sum(1), np.linspace(0, rows, height + 1), **beside)
    axes[1, 1].set_xlim(0, 1.05 * float(grid.sum(1).max()) or 1.0)
    axes[0, 1].axis("off")
    figure.colorbar(image, ax=axes[:, 1], label="sum of |delta|", fraction=0.4)
    shape = " x ".join(map(str, module.shape))
    title = f"{module.module} ({shape}): {module.deltas:,} deltas, {module.density:.2%}"
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def churn_figure(closes: Sequence[Close]) -> Figure:
    """At each close: the share of deltas that moved, the share offered for replacement, and the mean absolute delta."""
    steps = [close.step for close in closes]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    ax.plot(steps, [100 * close.rate for close in closes], "--", color="0.55", label="offered for replacement")
    ax.plot(steps, [100 * close.churn for close in closes], "o-", color="tab:blue", label="moved")
    ax.set(
        xlabel="optimizer step",
        ylabel="deltas (%)",
        title=f"Index churn over {len(closes)} close{'s' * (len(closes) != 1)}",
    )
    ax.set_ylim(0, 105)
    right = ax.twinx()
    right.plot(steps, [close.mean_abs_delta for close in closes], "s:", color="tab:red", label="mean |delta| (right)")
    right.set_ylim(bottom=0)
    right.set_ylabel("mean |delta|")
    lines = [*ax.get_lines(), *right.get_lines()]
    figure.legend(lines, [line.get_label() for line in lines], fontsize=9, loc="outside lower center", ncols=3)
    return figure


def loss_figure(losses: Losses, closes: Sequence[Close]) -> Figure:
    """Training and held-out loss by step, with the closes marked."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    for number, close in enumerate(closes):
        label = None if number else "close: deltas move"
        ax.axvline(close.step, color="0.75", linestyle="--", linewidth=1, zorder=0, label=label)
    steps, values = list(losses.train), np.array(list(losses.train.values()))
    window = max(1, len(steps) // 6)
    smooth = [float(values[max(0, end - window) : end].mean()) for end in range(1, len(steps) + 1)]
    ax.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=1, label="training batch")
    ax.plot(steps, smooth, color="tab:blue", alpha=0.8, label=f"training, mean of {window}")
    if losses.held_out:
        ax.plot(list(losses.held_out), list(losses.held_out.values()), "o-", color="tab:red", label="held out")
    for step, loss in losses.held_out.items():
        if not math.isfinite(loss):
            continue
        ax.annotate(f"{loss:.2f}", (step, loss), (0, 8), textcoords="offset points", ha="center", color="tab:red")
    shown = [loss for loss in (*smooth, *losses.held_out.values()) if math.isfinite(loss)]
    odd = sum(not math.isfinite(loss) for loss in (*losses.train.values(), *losses.held_out.values()))
    named = f", {odd} of the losses NaN or infinite" if odd else ""
    ax.set(xlabel="optimizer step", ylabel="loss (nats per learnt token)", title=f"Loss over {steps[-1]} steps{named}")
    # The running mean sets the scale: a single bad batch may leave the picture.
    ax.set_ylim(0, 1.25 * max(shown, default=1.0) or 1.0)
    ax.legend(loc="lower left", ncols=2, fontsize=9)
    return figure


def save_figures(
    figures: dict[str, Callable[[], Figure]],
    folder: str | os.PathLike[str],
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Draw figures and write them as ``<name>.png``; all are drawn before the first is put in place.

    Args:
        figures: functions that draw the figures, by name.
        folder: where to write; made if it does not exist. Other files in it are left alone.
        overwrite: replace pictures of these names.
        progress: called with (done, total, what).

    Raises:
        FileExistsError: a picture of such a name exists.
        ValueError: a figure cannot be drawn.
        OSError: the disk is full.
    """
    folder = Path(folder)
    targets = {name: folder / f"{name}.png" for name in figures}
    for path in targets.values():
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists already: choose another folder, or allow overwriting")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder, "plots")
    try:
        with work_folder(folder, "plots") as work:
            for done, (name, draw) in enumerate(figures.items(), start=1):
                figure = draw()
                FigureCanvasAgg(figure)
                figure.savefig(work / f"{name}.png", dpi=DPI)
                if progress is not None:
                    progress(done, len(figures), name)
            for name, path in targets.items():
                os.replace(work / f"{name}.png", path)
    except BaseException:
        if made:
            with suppress(OSError):  # it holds pictures that are in place already
                folder.rmdir()
        raise
    return list(targets.values())


def find_module(facts: AdapterFacts, name: str | None) -> ModuleFacts:
    """Find a module by its full name or the end of it; None gives the module whose deltas have the largest norm.

    Raises:
        ValueError: no module or several modules have that name.
    """
    if name is None:
        return max(facts.modules, key=lambda module: module.norm)
    exact = [module for module in facts.modules if module.module == name]
    found = exact or [module for module in facts.modules if module.module.endswith(f".{name}")]
    if len(found) != 1:
        shown = ", ".join(module.module for module in (found or facts.modules)[:4])
        what = "several modules" if found else "no module"
        raise ValueError(f"{facts.folder} has {what} named {name!r}; give one in full, such as {shown}")
    return found[0]
