"""The results of the GPU benchmark as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
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
from .operations import COPY, IN_PLACE, NO_DELTAS
from .running import DONE, REASON, RUNNING, STATUS

Entry = dict[str, Any]
Entries = dict[str, Entry]


def _status(name: str, result: Entry) -> list[str]:
    status, reason = result[STATUS], result.get(REASON, "").replace("|", "/").replace("\n", " ")[:160]
    if status == DONE:
        left_out = [f"{key.replace('_', ' ')}: {value}" for key, value in result.items() if "left_out" in key and value]
        return [name, f"done in {result['took_seconds']:.0f} s", "; ".join(left_out)]
    return [name, {RUNNING: "cut off"}.get(status, status), reason]


def _tests(results: Entries) -> Iterator[str]:
    """Counts of the tests by outcome, and the failed ones with the last line of their message."""
    found = {name: result for name, result in results.items() if "unfinished" in result}
    if not found:
        return
    rows = [
        [name, *(str(result[key]) for key in ("passed", "failed", "skipped"))]
        + [str(len(result["unfinished"] + result["not_begun"]))]
        + [result.get("ended", "cut off").replace("|", "/").replace("\n", " ")[:160]]
        for name, result in found.items()
    ]
    yield markdown(["tests", "passed", "failed", "skipped", "left", "end"], rows)
    failures = [failed for result in found.values() for failed in result["failures"]]
    if failures:
        yield "\n".join(f"- `{failed['test']}`: {_last_line(failed['message'])}" for failed in failures)


def _last_line(message: str) -> str:
    lines = [line for line in message.splitlines() if line.startswith("E ")] or message.strip().splitlines() or [""]
    return lines[0].removeprefix("E ").strip()[:160]


# Matrices of these shapes in LLaMA-2-7B (a transposed one counts as its twin), each of which a step with checkpointing
# makes three times: forward, again forward, backward.
_MATRICES_OF_7B = {(4096, 4096): 4 * 32, (11008, 4096): 3 * 32}
_PASSES = 3


def _in_place(entries: list[Entry]) -> str:
    """Table of the ways to make an adapted plain weight, and what in place saves in a step of LLaMA-2-7B."""
    rows = []
    for entry in entries:
        values = medians(entry)
        matrices = _MATRICES_OF_7B.get((entry["rows"], entry["cols"]))
        saved = "" if matrices is None else f"{(values[COPY] - values[IN_PLACE]) * matrices * _PASSES * 1e3:.1f}"
        row = [f"{entry['rows']}x{entry['cols']}", f"{entry['density']:.2%}", entry["indices"]]
        row.append("yes" if entry["product"] else "no")
        row += [f"{values[name] * 1e6:.1f}" if name in values else "" for name in (IN_PLACE, COPY, NO_DELTAS)]
        rows.append([*row, number(values[IN_PLACE] / values[COPY]), saved, "" if entry["sound"] else "WRONG RESULT"])
    header = ["weight", "density", "indices", "with product", "us in place", "us by copy", "us without deltas"]
    return markdown([*header, "in place over copy", "ms it saves in a step of 7B", ""], rows)


_KERNELS_SHOWN = 12


def _profile(name: str, result: Entry) -> str:
    """The kernels in which one step spends most of its time."""
    times = result["profile"]
    title = (
        f"{name}: {times['launches']} launches, {times['device_ms']:.1f} ms in kernels, {times['wall_ms']:.1f} ms with "
        "the profiler:"
    )
    rows = [
        [f"`{kernel.replace('|', '/')}`", str(count), f"{milliseconds:.2f}"]
        for kernel, count, milliseconds in times["kernels"][:_KERNELS_SHOWN]
    ]
    return f"{title}\n\n{markdown(['kernel', 'launches', 'ms'], rows)}"


def _steps(results: Entries) -> str:
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


def predicted_whole(steps: Entry | None, name: str, layers: int) -> float | None:
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


def whole_variants(results: Entries, model: str) -> Entries:
    """What was measured of a model at full depth ("7b_nf4"), by variant."""
    return {result["variant"]: result for result in results.values() if result.get("model") == model}


def _whole(model: str, results: Entries) -> list[list[str]]:
    variants = whole_variants(results, model)
    peaks = {name: entry["peak_mib"] for name, entry in variants.items() if "peak_mib" in entry}
    seconds = medians({"seconds": {name: entry.get("seconds", []) for name, entry in variants.items()}})
    rows = []
    for name, entry in variants.items():
        if name not in peaks:
            continue  # the table of states says why
        layers = entry["base"]["shape"]["layers"]
        predicted = predicted_whole(results.get(f"steps_{model}"), _SLICE_OF[name], layers)
        between = entry.get("peak_between_windows_mib")
        rows.append(
            [
                model,
                name,
                f"{peaks[name]:.0f}",
                number(ratio(peaks, name, LORA)),
                number(between, 0),
                f"{seconds[name] * 1e3:.0f}" if name in seconds else "",
                number(ratio(seconds, name, LORA)),
                "" if predicted is None else f"{predicted * 1e3:.0f}",
                ", ".join(f"{value * 1e3:.0f}" for value in entry["first_seconds"]),
            ]
        )
    return rows


def gpu_table(results: Entries) -> str:
    """The tables of all measurements, from what is known of each by name."""
    blocks = [markdown(["measurement", "state", "notes"], [_status(name, result) for name, result in results.items()])]
    blocks += _tests(results)
    steps = {name: result for name, result in results.items() if result.get("steps")}
    if steps:
        blocks.append(_steps(steps))
    whole = [row for model in ("7b_nf4", "7b_bf16") for row in _whole(model, results)]
    if whole:
        header = ["full depth", "variant", "peak MiB", "over LoRA", "MiB between windows", "median ms", "over LoRA"]
        blocks.append(markdown([*header, "ms from slices", "ms of the first steps"], whole))
    blocks += [_profile(name, result) for name, result in results.items() if "profile" in result]
    for result in results.values():
        if "compiled" in result:
            kinds = [f"{e['kernels']} for {kind} in {e['seconds']:.1f} s" for kind, e in result["compiled"].items()]
            blocks.append(f"Kernels compiled: {', '.join(kinds)}.")
        if "growth" in result:
            blocks.append(share_table(result["growth"]))
        if "in_place" in result:
            blocks.append(_in_place(result["in_place"]))
    operations = [entry for result in results.values() for entry in result.get("results", [])]
    if operations:
        blocks += [table(operations) for table in (operation_table, gather_table)]
    blocks += [describe_rates(result["rates"]) for result in results.values() if result.get("rates")]
    single = results.get("one_layer", {})
    if single.get("seconds"):
        blocks.append(layer_table(single, "frozen linear"))
    return "\n\n".join(block for block in blocks if block)
