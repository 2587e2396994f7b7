"""The results of the GPU benchmark as Markdown."""

from __future__ import annotations

from typing import Any

from ..ops.cost_models import describe_rates
from ..stepping import LORA
from ..tables import (
    gather_table,
    layer_table,
    markdown,
    medians,
    number,
    operation_table,
    ratio,
    share_table,
)
from .parts import FAILED, REASON, RUNNING, STATUS

Part = dict[str, Any]


def _status(name: str, result: Part | None) -> list[str]:
    if result is None:
        return [name, "not run", ""]
    if result[STATUS] == FAILED:
        return [name, "failed", result[REASON].replace("|", "/").replace("\n", " ")[:160]]
    if result[STATUS] == RUNNING:
        return [name, "cut off", ""]
    left_out = [f"{key.replace('_', ' ')}: {value}" for key, value in result.items() if "left_out" in key and value]
    return [name, f"done in {result['took_seconds']:.0f} s", "; ".join(left_out)]


def _steps(results: dict[str, Part]) -> str:
    """Table with a row per slice and setting and a column per variant: median ms, and its ratio to LoRA's."""
    entries = [(part, entry) for part, result in results.items() for entry in result.get("steps", [])]
    names = list(dict.fromkeys(name for _, entry in entries for name in (*entry["seconds"], *entry["failed"])))
    rows = []
    for part, entry in entries:
        values = medians(entry)
        cells = [
            f"{values[name] * 1e3:.1f} ({number(ratio(values, name, LORA))})"
            if name in values
            else "failed" * (name in entry["failed"])
            for name in names
        ]
        batch = f"{entry['batch_size']}x{entry['tokens']}"
        checkpointing = "yes" if entry["checkpointing"] else "no"
        model = part.removeprefix("steps_")
        rows.append([model, str(entry["layers"]), str(entry["r"]), batch, checkpointing, *cells])
    return markdown(["ms per step (over LoRA)", "layers", "r", "batch", "checkpointing", *names], rows)


def _layer_seconds(values: dict[int, float]) -> float | None:
    """Seconds per decoder layer, from the seconds of slices by number of layers; None for fewer than two slices."""
    if len(values) < 2:
        return None
    short, deep = min(values), max(values)
    return (values[deep] - values[short]) / (deep - short)


def predicted_whole(steps: Part | None, name: str, layers: int) -> float | None:
    """Predict the seconds of a step at full depth from slices of two depths in the first setting.

    Returns None if the slices were not measured.
    """
    entries = (steps or {}).get("steps", [])
    if not entries:
        return None
    first = entries[0]
    keys = ("r", "batch_size", "tokens", "checkpointing")
    alike = [entry for entry in entries if all(entry[key] == first[key] for key in keys)]
    values = {entry["layers"]: medians(entry)[name] for entry in alike if name in medians(entry)}
    per_layer = _layer_seconds(values)
    return None if per_layer is None else values[max(values)] + (layers - max(values)) * per_layer


# The slice variant that predicts each variant at full depth; in both, the profile gives the positions of the deltas.
_SLICE_OF = {
    LORA: LORA,
    "SpIEL-AG": "SpIEL-AG, profile indices",
    "SpIEL-MA, SM3": "SpIEL-MA, SM3, profile indices",
}


def _whole(part: str, results: dict[str, Part | None]) -> list[list[str]]:
    result = results.get(part) or {}
    variants = result.get("variants", {})
    layers = result.get("base", {}).get("shape", {}).get("layers", 0)
    peaks = {name: entry["peak_mib"] for name, entry in variants.items() if "peak_mib" in entry}
    seconds = medians({"seconds": {name: entry.get("seconds", []) for name, entry in variants.items()}})
    rows = []
    for name, entry in variants.items():
        if "failed" in entry:
            rows.append([part, name, "failed", entry["failed"][:60], "", "", "", ""])
            continue
        predicted = predicted_whole(results.get(part.replace("whole", "steps")), _SLICE_OF[name], layers)
        rows.append(
            [
                part.removeprefix("whole_"),
                name,
                f"{entry['peak_mib']:.0f}",
                number(ratio(peaks, name, LORA)),
                f"{entry['peak_between_windows_mib']:.0f}",
                f"{seconds[name] * 1e3:.0f}",
                number(ratio(seconds, name, LORA)),
                "" if predicted is None else f"{predicted * 1e3:.0f}",
            ]
        )
    return rows


def gpu_table(results: dict[str, Part | None]) -> str:
    """The tables of all parts, from their results by part name (None: not measured)."""
    present = {name: result for name, result in results.items() if result is not None}
    blocks = [markdown(["part", "status", "notes"], [_status(name, result) for name, result in results.items()])]
    steps = {name: result for name, result in present.items() if result.get("steps")}
    if steps:
        blocks.append(_steps(steps))
    whole = [row for name in present if name.startswith("whole_") for row in _whole(name, results)]
    if whole:
        header = ["full depth", "variant", "peak MiB", "over LoRA", "MiB between windows", "median ms", "over LoRA"]
        blocks.append(markdown([*header, "ms from slices"], whole))
    shares = present.get("share", {}).get("growth")
    if shares:
        blocks.append(share_table(shares))
    operations = [entry for result in present.values() for entry in result.get("results", [])]
    if operations:
        blocks += [table(operations) for table in (operation_table, gather_table)]
    blocks += [describe_rates(result["rates"]) for result in present.values() if result.get("rates")]
    single = present.get("one_layer", {})
    if single.get("seconds"):
        blocks.append(layer_table(single, "frozen linear"))
    return "\n\n".join(block for block in blocks if block)
