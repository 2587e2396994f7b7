"""Markdown tables of results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from .environment import RESULTS, load, load_all
from .ops.cost_models import fits
from .stepping import LORA, LOWER_BOUND, REGROW_EVERY, moving_steps
from .timing import median, quantile
from .variants import FIRST_CLOSE

Row = Sequence[str]
GPU_PARTS = ("gpu_one", "gpu_two")


class Results:
    """The result files of one folder."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder
        self._loaded: dict[str, dict[str, Any] | None] = {}

    def get(self, name: str) -> dict[str, Any] | None:
        """The result of this name, or None if it was not measured."""
        if name not in self._loaded:
            self._loaded[name] = load(name, self.folder)
        return self._loaded[name]

    def gpu(self) -> dict[str, dict[str, Any]]:
        """What is known of each measurement of the GPU benchmark, by name, from the files of both parts."""
        found = [(self.get(part) or {}).get("measurements", {}) for part in GPU_PARTS]
        return {name: entry for measurements in found for name, entry in measurements.items()}

    def starting(self, prefix: str) -> dict[str, dict[str, Any]]:
        """Results whose names begin with a prefix, by name; smaller batches and budgets first."""
        found = load_all(prefix, self.folder)
        return dict(sorted(found.items(), key=lambda item: _order(item[1])))


def _order(result: dict[str, Any]) -> tuple[int, int]:
    settings = result.get("settings", {})
    return settings.get("batch_size", 0) * settings.get("tokens", 0), settings.get("r", 0)


def markdown(header: Row, rows: Iterable[Row]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def medians(result: dict[str, Any] | None) -> dict[str, float]:
    """Median seconds by variant."""
    return {} if result is None else {name: median(values) for name, values in result["seconds"].items() if values}


def ratio(values: dict[str, float], name: str, reference: str) -> float | None:
    """One value over another; None if one is missing or the reference is 0 (GPU memory on a CPU)."""
    return values[name] / values[reference] if name in values and values.get(reference) else None


def peaks(result: dict[str, Any] | None, key: str = "peak_mib") -> dict[str, float]:
    """Peak MiB by variant, without failed variants; with the key "steady_mib", the peak between windows."""
    if result is None:
        return {}
    return {name: entry[key] for name, entry in result["memory"].items() if key in entry}


def setting_name(settings: dict[str, Any]) -> str:
    return f"r={settings['r']}, {settings['batch_size']}x{settings['tokens']}"


def where(result: dict[str, Any]) -> str:
    """One line that names machine, versions, commit and date."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    return f"{result['device']}, {result['threads']} threads; {versions}; {result['commit']}, {result['date'][:10]}"


def quality_table(results: Results) -> str:
    """Held-out loss by method and learning rate."""
    result = results.get("quality_smollm2")
    if result is None:
        return ""
    rates = sorted({run["learning_rate"] for run in result["runs"]})
    losses = {(run["method"], run["learning_rate"]): run["held_out_loss"] for run in result["runs"]}
    rows = [
        [method, *(f"{losses[method, rate]:.3f}" if (method, rate) in losses else "" for rate in rates)]
        for method in sorted({method for method, _ in losses})
    ]
    return markdown(["held-out loss", *(f"lr {rate:.0e}" for rate in rates)], rows)


def alone_seconds(result: dict[str, Any] | None, part: str) -> dict[str, list[float]]:
    """Seconds per step of each variant in a process of its own, one number per round.

    Args:
        result: of `python -m benchmarks step --parts alone`.
        part: "cycle": mean over a whole default cycle after the first close. "between windows": median over the steps
            of that cycle outside SpIEL-AG's windows; the same steps for every variant. "first close": not per step, but
            what the steps up to the first close took in all above that median.
    """
    seconds: dict[str, list[float]] = {}
    for entries in (result or {}).get("rounds", []):
        for name, entry in entries.items():
            if "error" in entry:
                continue
            cycle = range(FIRST_CLOSE + 1, FIRST_CLOSE + REGROW_EVERY + 1)
            moving = moving_steps("accumulated_gradient", cycle[-1])
            values = {step: entry["seconds"][step - 1] for step in cycle}
            plain = median([value for step, value in values.items() if step not in moving])
            parts = {
                "cycle": mean(values.values()),
                "between windows": plain,
                "first close": sum(entry["seconds"][:FIRST_CLOSE]) - FIRST_CLOSE * plain,
            }
            seconds.setdefault(name, []).append(parts[part])
    return seconds


def alone_peaks(result: dict[str, Any] | None) -> dict[str, list[float]]:
    """Peak MiB of each variant in a process of its own, one number per round."""
    found: dict[str, list[float]] = {}
    for entries in (result or {}).get("rounds", []):
        for name, entry in entries.items():
            if "error" not in entry:
                found.setdefault(name, []).append(entry["peak_mib"])
    return found


def ratio_by_round(values: dict[str, list[float]], name: str, reference: str) -> float | None:
    """Median over rounds of the ratio of two variants in the same round; None if one is missing."""
    pairs = list(zip(values.get(name, []), values.get(reference, []), strict=False))
    return median([value / of_reference for value, of_reference in pairs]) if pairs else None


def alone_table(results: Results) -> str:
    """Times and peak memory of each variant in a process of its own, and their ratios to LoRA's."""
    rows = []
    for result in results.starting("alone_smollm2").values():
        measured = [alone_seconds(result, "between windows"), alone_seconds(result, "cycle")]
        first, measured_peaks = alone_seconds(result, "first close"), alone_peaks(result)
        for name in measured_peaks:
            cells = [
                f"{median(seconds[name]):.2f} s ({number(ratio_by_round(seconds, name, LORA))})" for seconds in measured
            ]
            cells.append(f"{median(first[name]):+.1f} s")
            over = number(ratio_by_round(measured_peaks, name, LORA))
            cells.append(f"{median(measured_peaks[name]):.0f} MiB ({over})")
            rows.append([setting_name(result["settings"]), name, *cells])
    steps = ["step between windows", "step over a whole cycle", "first 5 steps, once"]
    return markdown(["setting", "method (over LoRA)", *steps, "peak memory"], rows) if rows else ""


def alone_rounds_table(result: dict[str, Any]) -> str:
    """Table of one setting: the numbers of every round."""
    columns = [alone_seconds(result, "between windows"), alone_seconds(result, "cycle"), alone_peaks(result)]
    rows = [[name, *(", ".join(f"{value:.4g}" for value in column[name]) for column in columns)] for name in columns[0]]
    rows += [
        [name, "failed", entry["error"].replace("\n", " ").replace("|", "/")[:80], ""]
        for entries in result["rounds"]
        for name, entry in entries.items()
        if "error" in entry
    ]
    return markdown(["round by round", "s between windows", "s over a whole cycle", "peak MiB"], rows)


def step_overview(results: Results) -> str:
    """Table of the seconds per step and their ratios to LoRA's, by variant and setting."""
    found = results.starting("step_smollm2")
    if not found:
        return ""
    names = list(dict.fromkeys(name for result in found.values() for name in result["seconds"]))
    rows = []
    for name in names:
        cells = []
        for result in found.values():
            values = medians(result)
            over = ratio(values, name, LORA)
            cells.append(f"{values[name]:.2f} s ({number(over)})" if name in values else "")
        rows.append([name, *cells])
    return markdown(["step (over LoRA)", *(setting_name(r["settings"]) for r in found.values())], rows)


def step_table(result: dict[str, Any]) -> str:
    """Table of one setting: medians, 20% and 80% quantiles, ratios."""
    values = medians(result)
    rows = [
        [
            name,
            f"{values[name]:.3f}",
            f"{quantile(seconds, 0.2):.3f} to {quantile(seconds, 0.8):.3f}",
            number(ratio(values, name, LORA)),
            number(ratio(values, name, LOWER_BOUND)),
        ]
        for name, seconds in result["seconds"].items()
        if seconds
    ]
    rows += [[name, "failed", reason[:80], "", ""] for name, reason in result.get("failed", {}).items()]
    return markdown(["step", "median s", "20% to 80%", "over LoRA", "over lower bound"], rows)


def memory_table(result: dict[str, Any]) -> str:
    """Table of the peak memory at one setting: through SpIEL's first window and close, and between windows."""
    highest, steady = peaks(result), peaks(result, "steady_mib")
    rows = []
    for name, entry in result["memory"].items():
        if "error" in entry:
            rows.append([name, "failed", entry["error"].replace("\n", " ").replace("|", "/")[:80], "", "", ""])
            continue
        cells = [[f"{values[name]:.0f}", number(ratio(values, name, LORA))] for values in (highest, steady)]
        rows.append([name, f"{entry['loaded_mib']:.0f}", *cells[0], *cells[1]])
    header = ["memory", "MiB before set-up", "peak MiB", "over LoRA", "peak MiB between windows", "over LoRA"]
    return markdown(header, rows)


def layer_table(result: dict[str, Any], reference: str) -> str:
    values = medians(result)
    rows = [[name, f"{value * 1e3:.1f}", number(ratio(values, name, reference))] for name, value in values.items()]
    return markdown(["forward + backward", "median ms", f"over {reference}"], rows)


def share_table(growths: dict[str, Any]) -> str:
    """Table of the share of a run that windows and closes take, by growth criterion."""
    rows = [
        [growth, f"{entry['share']:.1%}", f"{entry['share_of_moving_steps']:.1%}", str(len(entry["seconds"]))]
        for growth, entry in growths.items()
    ]
    return markdown(["growth", "share of a run", "counting only moving steps", "steps timed"], rows)


def _case_key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["rows"], entry["cols"], entry["tokens"], entry["dtype"], entry["indices"]


def gather_table(entries: Sequence[dict[str, Any]]) -> str:
    """Table of the time of the gather over the dense product, by method and density."""
    gathers = [entry for entry in entries if entry["op"].startswith("gather")]
    if not gathers:
        return ""
    densities = sorted({entry["density"] for entry in gathers})
    cells: dict[tuple[Any, ...], dict[float, str]] = {}
    for entry in gathers:
        line = cells.setdefault((*_case_key(entry), entry["op"]), {})
        if "failed" in entry:
            line[entry["density"]] = "failed"
        else:
            line[entry["density"]] = number(median(entry["seconds"]) / median(entry["dense_seconds"]))
    rows = [
        [f"{rows}x{cols}", str(tokens), dtype, kind, op, *(line.get(density, "") for density in densities)]
        for (rows, cols, tokens, dtype, kind, op), line in cells.items()
    ]
    header = ["weight", "tokens", "dtype", "indices", "time over dense, density", *(f"{d:.2%}" for d in densities)]
    return markdown(header, rows)


def operation_table(entries: Sequence[dict[str, Any]]) -> str:
    """Table of the operations other than gathers: time, and its ratios to the dense formula and to the floor."""
    rows = []
    names = list(dict.fromkeys(entry["op"] for entry in entries if not entry["op"].startswith("gather")))
    if not names:
        return ""
    for entry in sorted((e for e in entries if e["op"] in names), key=lambda entry: names.index(entry["op"])):
        line = [entry["op"], f"{entry['rows']}x{entry['cols']}", f"{entry['density']:.2%}", str(entry["tokens"])]
        line += [entry["dtype"], entry["indices"]]
        if "failed" in entry:
            rows.append([*line, "failed", entry["failed"][:60], ""])
            continue
        seconds = median(entry["seconds"])
        over_dense = seconds / median(entry["dense_seconds"])
        rows.append([*line, f"{seconds * 1e3:.3f}", number(over_dense), number(seconds / entry["floor_seconds"])])
    header = ["operation", "weight", "density", "tokens", "dtype", "indices", "median ms", "over dense", "over floor"]
    return markdown(header, rows)


def fit_table(entries: Sequence[dict[str, Any]]) -> str:
    """Table of the constants of the sampled gather's cost model."""
    rows = [
        [str(tokens), dtype, f"{fit.per_size:.0f}", f"{fit.per_density:.2f}", f"{fit.relative_error:.0%}"]
        for (tokens, dtype), fit in fits(entries).items()
    ]
    return markdown(["tokens", "dtype", "A", "B", "relative error"], rows)


def scaling_table(result: dict[str, Any]) -> str:
    """Table of step times and memory as one size grows."""
    names = list(dict.fromkeys(name for entry in result["results"] for name in entry["seconds"]))
    rows = []
    for entry in result["results"]:
        values, memory = medians(entry), peaks(entry) if "memory" in entry else {}
        grows = entry["grows"]
        size = f"{entry['density']:.2%}" if grows == "density" else str(entry[grows])
        cells = [f"{values[n] * 1e3:.0f} ms" if n in values else "" for n in names]
        weights = [number(ratio(memory, n, LORA)) for n in names if n not in (LORA, "dense formula")]
        rows.append([grows, size, *cells, *weights])
    weighed = [f"memory of {n} over LoRA" for n in names if n not in (LORA, "dense formula")]
    return markdown(["grows", "at", *names, *weighed], rows)


def profile_table(result: dict[str, Any]) -> str:
    """Table of how concentrated gradients are, by type of module."""
    rows = [
        [
            kind,
            f"{entry['shape'][0]}x{entry['shape'][1]}",
            number(entry["rows"][0], 1),
            number(entry["cols"][0], 1),
            f"{entry['block_share']:.1%}",
            f"{entry['block_share_drawn']:.1%}",
        ]
        for kind, entry in result["modules"].items()
    ]
    header = ["module", "weight", "heaviest row / mean", "heaviest column / mean"]
    return markdown([*header, "dense product left in blocks of 64 rows", "the same, drawn"], rows)
