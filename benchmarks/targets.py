"""Where speed and memory must get to, and where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .gpu_training import AG, MA, UNIFORM
from .layer import FROZEN
from .stepping import LORA, LOWER_BOUND
from .tables import Results, alone_seconds, markdown, medians, peaks, ratio, ratio_by_round
from .timing import median

Value = Callable[[Results], "float | None"]
SPIEL = "SpIEL-AG"
SPIEL_MA = "SpIEL-MA, SM3"


@dataclass(frozen=True)
class Target:
    """A ratio (or share) and the most it may be."""

    label: str
    limit: float
    value: Value


def _cpu_step(r: int, name: str, reference: str) -> Value:
    return lambda results: ratio(medians(results.get(f"step_smollm2_r{r}_4x128")), name, reference)


def _cpu_memory(r: int, name: str) -> Value:
    return lambda results: ratio(peaks(results.get(f"memory_smollm2_r{r}_4x128")), name, LORA)


def _layer(results: Results) -> float | None:
    return ratio(medians(results.get("layer_4096x4096")), "SpIEL, profile indices", FROZEN)


def _share(growth: str, r: int) -> Value:
    def value(results: Results) -> float | None:
        result = results.get(f"share_smollm2_r{r}_4x128")
        return None if result is None else result["growth"][growth]["share"]

    return value


def gpu_slice(result: dict[str, Any] | None, r: int, checkpointing: bool) -> dict[str, float]:
    """Median seconds by variant of a step of the deeper slice on 1x2048 tokens."""
    for entry in (result or {}).get("steps", []):
        setting = entry["batch_size"], entry["tokens"], entry["checkpointing"], entry["r"]
        if setting == (1, 2048, checkpointing, r):
            return medians(entry)
    return {}


def _gpu_step(part: str, name: str, checkpointing: bool) -> Value:
    return lambda results: ratio(gpu_slice(results.get(f"gpu_{part}"), 64, checkpointing), name, LORA)


def whole_values(result: dict[str, Any] | None, key: str) -> dict[str, float]:
    """A number by variant of the models of full depth; of seconds the median."""
    variants = (result or {}).get("variants", {})
    found = {name: entry[key] for name, entry in variants.items() if key in entry}
    return {name: median(value) if isinstance(value, list) else value for name, value in found.items()}


def _gpu_whole(name: str, key: str) -> Value:
    return lambda results: ratio(whole_values(results.get("gpu_whole_7b_nf4"), key), name, LORA)


def _gpu_fold(rows: int, cols: int) -> Value:
    """The worst of all densities and kinds of index sets."""

    def value(results: Results) -> float | None:
        entries = (results.get("gpu_dequantize") or {}).get("results", [])
        found = [
            median(entry["seconds"]) / entry["floor_seconds"]
            for entry in entries
            if entry["op"] == "fold nf4" and (entry["rows"], entry["cols"]) == (rows, cols) and "failed" not in entry
        ]
        return max(found, default=None)

    return value


def _alone(r: int, part: str) -> Value:
    return lambda results: ratio_by_round(alone_seconds(results.get(f"alone_smollm2_r{r}_4x128"), part), SPIEL, LORA)


_ALONE = "CPU, SmolLM2-135M, fp32, 4x128, as users run it: step, SpIEL / LoRA"
_STEP = "CPU, SmolLM2-135M, fp32, 4x128, many models in one process: step"
_NF4 = "H100, 7B NF4, r=64, checkpointing, 1x2048"
_BF16 = "H100, 7B bf16, r=64, 1x2048"
TARGETS = (
    Target(f"{_ALONE}, whole cycle, r=16", 1.0, _alone(16, "cycle")),
    Target(f"{_ALONE}, between windows, r=16", 0.97, _alone(16, "between windows")),
    Target(f"{_STEP}, SpIEL / LoRA, r=4", 0.95, _cpu_step(4, SPIEL, LORA)),
    Target(f"{_STEP}, SpIEL / LoRA, r=16", 1.03, _cpu_step(16, SPIEL, LORA)),
    Target(f"{_STEP}, SpIEL / LoRA with dropout 0.05, r=4", 0.75, _cpu_step(4, SPIEL, "LoRA, dropout 0.05")),
    Target(f"{_STEP}, SpIEL / LoRA with dropout 0.05, r=16", 0.82, _cpu_step(16, SPIEL, "LoRA, dropout 0.05")),
    Target(f"{_STEP}, SpIEL / lower bound, r=4", 1.12, _cpu_step(4, SPIEL, LOWER_BOUND)),
    Target(f"{_STEP}, SpIEL / lower bound, r=16", 1.20, _cpu_step(16, SPIEL, LOWER_BOUND)),
    Target("the same, peak memory, SpIEL-AG / LoRA, r=4", 0.82, _cpu_memory(4, SPIEL)),
    Target("the same, peak memory, SpIEL-AG / LoRA, r=16", 0.82, _cpu_memory(16, SPIEL)),
    Target("the same, peak memory, SpIEL-MA / LoRA, r=16", 0.82, _cpu_memory(16, SPIEL_MA)),
    Target("CPU, 4096x4096, 1% density, 2048 tokens, forward + backward over frozen linear", 1.12, _layer),
    Target("share of a run spent moving deltas, SpIEL-AG (CPU), r=8", 0.04, _share("accumulated_gradient", 8)),
    Target("share of a run spent moving deltas, SpIEL-MA (CPU), r=8", 0.04, _share("momentum", 8)),
    Target("share of a run spent moving deltas, SpIEL-AG (CPU), r=16", 0.04, _share("accumulated_gradient", 16)),
    Target("share of a run spent moving deltas, SpIEL-MA (CPU), r=16", 0.04, _share("momentum", 16)),
    Target(f"{_NF4}: step, SpIEL-AG / QLoRA, full depth", 1.0, _gpu_whole(SPIEL, "seconds")),
    Target(f"{_NF4}: step, SpIEL-MA / QLoRA, full depth", 1.0, _gpu_whole(SPIEL_MA, "seconds")),
    Target(f"{_NF4}: step, SpIEL-AG / QLoRA, slice, profile indices", 1.0, _gpu_step("steps_7b_nf4", AG, True)),
    Target(f"{_NF4}: step, SpIEL-AG / QLoRA, slice, uniform indices", 1.0, _gpu_step("steps_7b_nf4", UNIFORM, True)),
    Target(f"{_NF4}: step, SpIEL-MA / QLoRA, slice, profile indices", 1.0, _gpu_step("steps_7b_nf4", MA, True)),
    Target(f"{_NF4}: peak memory, SpIEL-MA + SM3 / QLoRA", 0.95, _gpu_whole(SPIEL_MA, "peak_mib")),
    Target(f"{_NF4}: peak memory, SpIEL-AG + AdamW / QLoRA", 1.03, _gpu_whole(SPIEL, "peak_mib")),
    Target(f"{_BF16}: step, SpIEL-AG / LoRA, slice, profile indices", 1.05, _gpu_step("steps_7b_bf16", AG, False)),
    Target(f"{_BF16}, checkpointing: step, SpIEL-AG / LoRA, slice", 1.05, _gpu_step("steps_7b_bf16", AG, True)),
    Target("H100: NF4 dequantize + scatter-add over its byte floor, 4096x4096", 1.3, _gpu_fold(4096, 4096)),
    Target("H100: NF4 dequantize + scatter-add over its byte floor, 11008x4096", 1.3, _gpu_fold(11008, 4096)),
)


def _shown(value: float, limit: float) -> str:
    return f"{value:.1%}" if limit < 0.1 else f"{value:.2f}"


def judge(target: Target, results: Results) -> list[str]:
    """Label, target, measured value, and "met", "missed" or "not measured"."""
    value = target.value(results)
    if value is None:
        return [target.label, f"<= {_shown(target.limit, target.limit)}", "", "not measured"]
    verdict = "met" if value <= target.limit else "missed"
    return [target.label, f"<= {_shown(target.limit, target.limit)}", _shown(value, target.limit), verdict]


def target_table(results: Results) -> str:
    return markdown(["target", "at most", "measured", ""], [judge(target, results) for target in TARGETS])
