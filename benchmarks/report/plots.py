"""Plots of the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..ops.cost_models import SAMPLED, fits
from ..stepping import LORA
from ..tables import Results, medians, peaks, setting_name
from ..timing import median

_DPI = 90
_COLOURS = ("0.6", "tab:blue", "tab:cyan", "tab:red", "tab:orange", "tab:purple", "tab:green", "tab:brown")


def _bars(axes: Any, groups: dict[str, dict[str, float]], reference: str, label: str) -> None:
    """Bars of values over a reference, one group per setting; a line at one is the reference."""
    names = list(dict.fromkeys(name for values in groups.values() for name in values if name != reference))
    width = 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        heights = [values.get(name, 0.0) / values[reference] for values in groups.values()]
        starts = [group + (place - (len(names) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(starts, heights, width, label=name, color=_COLOURS[place % len(_COLOURS)])
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel(label)
    axes.legend(fontsize=7, ncols=2)


def _step_groups(results: Results) -> dict[str, dict[str, float]]:
    found = results.starting("step_smollm2")
    groups = {setting_name(result["settings"]): medians(result) for result in found.values()}
    return {name: values for name, values in groups.items() if LORA in values}


def _memory_groups(results: Results) -> dict[str, dict[str, float]]:
    found = results.starting("memory_smollm2")
    groups = {setting_name(result["settings"]): peaks(result) for result in found.values()}
    return {name: values for name, values in groups.items() if LORA in values}


def _draw_steps(axes: Sequence[Any], results: Results) -> None:
    _bars(axes[0], _step_groups(results), LORA, "time of a step over LoRA's")


def _draw_memory(axes: Sequence[Any], results: Results) -> None:
    _bars(axes[0], _memory_groups(results), LORA, "peak memory over LoRA's")


def _gather_lines(entries: Sequence[dict[str, Any]], by: Callable[[dict[str, Any]], str]) -> dict[str, list[Any]]:
    """Points of each line: density, and time of the gather over the dense product."""
    lines: dict[str, list[Any]] = {}
    for entry in entries:
        if "failed" not in entry:
            cost = median(entry["seconds"]) / median(entry["dense_seconds"])
            lines.setdefault(by(entry), []).append((entry["density"], cost))
    return {name: sorted(points) for name, points in lines.items()}


def _cost_axes(axes: Any, title: str) -> None:
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="density", ylabel="time over the dense product", title=title)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _sampled(results: Results) -> list[dict[str, Any]]:
    entries = (results.get("ops_cpu") or {}).get("results", [])
    return [entry for entry in entries if entry["op"] == SAMPLED and entry["dtype"] == "float32"]


def _draw_gather(axes: Sequence[Any], results: Results) -> None:
    entries = _sampled(results)
    for panel, tokens in zip(axes, sorted({entry["tokens"] for entry in entries})[: len(axes)], strict=False):
        here = [entry for entry in entries if entry["tokens"] == tokens]
        fit = fits(here).get((tokens, "float32"))
        shapes = {f"{entry['rows']}x{entry['cols']}": (entry["rows"], entry["cols"]) for entry in here}
        lines = _gather_lines(here, lambda entry: f"{entry['rows']}x{entry['cols']}")
        for colour, (name, points) in zip(_COLOURS[1:], lines.items(), strict=False):
            panel.plot(*zip(*points, strict=True), "o", color=colour, label=name)
            if fit is not None:
                panel.plot(
                    [density for density, _ in points],
                    [fit.over_dense(*shapes[name], density) for density, _ in points],
                    color=colour,
                    linewidth=1,
                )
        _cost_axes(panel, f"sampled gather on the CPU, {tokens} tokens (lines: fitted)")


def _gpu_gather(results: Results) -> list[dict[str, Any]]:
    return results.gpu().get("gather", {}).get("results", [])


def _draw_gpu_gather(axes: Sequence[Any], results: Results) -> None:
    for panel, kind in zip(axes, ("profile", "uniform"), strict=True):
        here = [e for e in _gpu_gather(results) if e["indices"] == kind and e["rows"] == e["cols"]]
        for name, points in _gather_lines(here, lambda entry: entry["op"]).items():
            panel.plot(*zip(*points, strict=True), "o-", label=name)
        _cost_axes(panel, f"gather on the GPU, {kind} indices")


def _draw_scaling(axes: Sequence[Any], results: Results) -> None:
    entries = (results.get("scaling_cpu") or {})["results"]
    for panel, grows in zip(axes, ("density", "width", "tokens"), strict=True):
        here = [entry for entry in entries if entry["grows"] == grows]
        for name in dict.fromkeys(name for entry in here for name in entry["seconds"]):
            points = [(entry[grows], medians(entry)[name]) for entry in here if name in medians(entry)]
            panel.plot(*zip(*points, strict=True), "o-", label=name)
        panel.set(xscale="log", yscale="log", xlabel=grows, ylabel="seconds per step")
        panel.legend(fontsize=7)


# Name -> title, number of panels, function that returns the data (empty: no plot), function that draws.
PLOTS: dict[str, tuple[str, int, Callable[[Results], Any], Callable[[Sequence[Any], Results], None]]] = {
    "steps": ("Training steps of SmolLM2-135M on the CPU", 1, _step_groups, _draw_steps),
    "memory": ("Peak memory of SmolLM2-135M on the CPU", 1, _memory_groups, _draw_memory),
    "gather": ("Sparse gradient over the dense one on the CPU", 2, _sampled, _draw_gather),
    "scaling": ("Small random Llamas on the CPU", 3, lambda results: results.get("scaling_cpu"), _draw_scaling),
    "gpu_gather": ("Sparse gradient over the dense one on the GPU", 2, _gpu_gather, _draw_gpu_gather),
}


def drawable(results: Results) -> dict[str, str]:
    """Titles of the plots for which there are results, by name."""
    return {name: title for name, (title, _, data, _) in PLOTS.items() if data(results)}


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draw every plot that has results into a folder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in drawable(results):
        title, panels, _, draw = PLOTS[name]
        figure, axes = plt.subplots(1, panels, figsize=(max(6.5, 4.6 * panels), 3.6), layout="constrained")
        draw([axes] if panels == 1 else list(axes), results)
        figure.suptitle(title, fontsize=10)
        paths.append(folder / f"{name}.png")
        # Without a date inside, equal results give equal files.
        figure.savefig(paths[-1], dpi=_DPI, metadata={"Software": None})
        plt.close(figure)
    return paths
