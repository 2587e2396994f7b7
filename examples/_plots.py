"""The two pictures of finetune.py: how the loss fell, and where in the model the deltas landed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")  # files only; works without a display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

DPI = 130


# -- loss curve ------------------------------------------------------------------------------------


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the ones before it, ``window`` at most."""
    return [
        sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
        for i in range(len(values))
    ]


def plot_loss(
    train: Mapping[int, float], held_out: Mapping[int, float], closes: Sequence[int], title: str, path: Path
) -> None:
    """Training and held-out loss by step, with the steps of the closes marked."""
    figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, step in enumerate(closes):
        label = "close: deltas move" if i == 0 else None
        ax.axvline(step, color="0.75", linestyle="--", linewidth=1, zorder=0, label=label)
    window = max(1, len(train) // 6)
    smooth = running_mean(list(train.values()), window)
    ax.plot(list(train), list(train.values()), color="tab:blue", alpha=0.25, linewidth=1, label="training batch")
    ax.plot(list(train), smooth, color="tab:blue", alpha=0.8, label=f"training, mean of {window} batches")
    ax.plot(list(held_out), list(held_out.values()), "o-", color="tab:red", linewidth=2, label="held-out pairs")
    for step, loss in held_out.items():
        ax.annotate(f"{loss:.2f}", (step, loss), (0, 9), textcoords="offset points", ha="center", color="tab:red")
    last = max(held_out, default=1)
    ax.set(xlabel="optimizer step", ylabel="loss (nats per answer token)", title=title)
    ax.set_xlim(-0.03 * last, 1.03 * last)
    ax.set_ylim(0, 1.25 * max([*smooth, *held_out.values()]))  # a single bad batch may leave the picture
    ax.legend(loc="lower left", ncols=2, fontsize=9, framealpha=0.9)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


# -- where the deltas landed -----------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleDeltas:
    """What one adapted module holds after training."""

    layer: int | None  # None for a module outside of the numbered layers
    kind: str  # its name inside the layer
    mass: float  # sum of |delta|
    count: int
    busiest: float  # share of the deltas in the busiest hundredth of the weight's columns


def collect_deltas(model: torch.nn.Module, adapter: str = "default") -> list[ModuleDeltas]:
    """Reads the deltas of every SpIEL layer of a model, in the model's order."""
    return [
        _read_module(name, module, adapter)
        for name, module in model.named_modules()
        if hasattr(module, "spiel_delta") and adapter in module.spiel_delta
    ]


def _read_module(name: str, module: Any, adapter: str) -> ModuleDeltas:
    """The numbers of one SpIEL layer."""
    delta = module.spiel_delta[adapter]
    values, indices = delta.values.detach().float(), delta.indices.long().cpu()
    # Indices are row-major positions in the weight; a column is one input feature of the layer.
    columns = module.get_base_layer().in_features if hasattr(module.get_base_layer(), "in_features") else 0
    busiest = 0.0
    if columns and indices.numel():
        per_column = torch.bincount(indices % columns, minlength=columns).sort(descending=True).values
        busiest = float(per_column[: max(1, round(columns / 100))].sum() / indices.numel())
    # Greedy: the last number in the name is the layer's, as in model.layers.7.mlp.up_proj.
    match = re.match(r".*\.(\d+)\.(.+)$", name)
    layer, kind = (int(match[1]), match[2]) if match else (None, name.rsplit(".", 1)[-1])
    return ModuleDeltas(layer, kind, float(values.abs().sum()), values.numel(), busiest)


def plot_deltas(deltas: Sequence[ModuleDeltas], path: Path) -> None:
    """Heat maps of layer by module: share of all |delta|, mean |delta|, and how far the deltas crowd."""
    total = sum(d.mass for d in deltas) or 1.0
    panels = [
        ("share of all |delta| (%)", "viridis", [100 * d.mass / total for d in deltas]),
        ("mean |delta|", "viridis", [d.mass / d.count for d in deltas]),
        ("deltas in the busiest\n1% of columns (%)", "magma", [100 * d.busiest for d in deltas]),
    ]
    layers = sorted({d.layer for d in deltas if d.layer is not None})
    rows: list[int | None] = [*layers, *([None] if any(d.layer is None for d in deltas) else [])]
    kinds = list(dict.fromkeys(d.kind for d in deltas))
    size = 2.5 + 1.2 * len(kinds), max(3.5, 1.8 + 0.2 * len(rows))
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, layout="constrained")
    for ax, (title, cmap, values) in zip(axes, panels, strict=True):
        grid = torch.full((len(rows), len(kinds)), float("nan"))
        for d, value in zip(deltas, values, strict=True):
            grid[rows.index(d.layer), kinds.index(d.kind)] = value
        _heat_map(ax, grid, title, cmap)
        ax.set_xticks(range(len(kinds)), [k.removesuffix("_proj") for k in kinds], rotation=60, ha="right")
    every = max(1, len(rows) // 15)
    labels = ["-" if row is None else str(row) for row in rows]
    axes[0].set_yticks(range(0, len(rows), every), labels[::every])
    axes[0].set_ylabel("layer")
    figure.suptitle(f"Where {sum(d.count for d in deltas):,} deltas landed")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _heat_map(ax: Axes, grid: torch.Tensor, title: str, cmap: str) -> None:
    """One panel with its colour bar; modules that a layer does not have stay blank."""
    image = ax.imshow(grid.numpy(), aspect="auto", cmap=cmap, vmin=0, interpolation="nearest")
    ax.set_title(title, fontsize=10)
    ax.figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02)
