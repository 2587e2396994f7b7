"""The page of all results as Markdown: targets for speed and memory, and tables of everything that was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .. import memory
from ..gpu.compiled import RESULT as COMPILED
from ..gpu.compiled import compiled_table
from ..gpu.table import gpu_table, whole_variants
from ..gpu.training import AG, MA, UNIFORM
from ..layer import FROZEN
from ..stepping import LORA, LOWER_BOUND
from ..tables import (
    GPU_PARTS,
    Results,
    alone_rounds_table,
    alone_seconds,
    alone_table,
    fit_table,
    gather_table,
    layer_table,
    markdown,
    medians,
    memory_table,
    operation_table,
    peaks,
    profile_table,
    quality_table,
    ratio,
    ratio_by_round,
    scaling_table,
    setting_name,
    share_table,
    step_overview,
    step_table,
    where,
)
from ..timing import median
from .plots import drawable

Value = Callable[[Results], "float | None"]
SPIEL = "SpIEL-AG"
SPIEL_MA = "SpIEL-MA, SM3"


@dataclass(frozen=True)
class Target:
    """A ratio (or share) and its upper limit.

    Attributes:
        value: reads the ratio from the results; None if it was not measured.
    """

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
    """Median seconds per step by variant, on a slice with 1x2048 tokens; the first entry of this rank counts."""
    for entry in (result or {}).get("steps", []):
        setting = entry["batch_size"], entry["tokens"], entry["checkpointing"], entry["r"]
        if setting == (1, 2048, checkpointing, r):
            return medians(entry)
    return {}


def _gpu_step(part: str, name: str, checkpointing: bool) -> Value:
    return lambda results: ratio(gpu_slice(results.gpu().get(part), 64, checkpointing), name, LORA)


def _gpu_whole(name: str, key: str) -> Value:
    """One number of a variant over LoRA's, LLaMA-2-7B NF4 at full depth; of a list the median."""

    def value(results: Results) -> float | None:
        variants = whole_variants(results.gpu(), "7b_nf4")
        found = {variant: entry[key] for variant, entry in variants.items() if key in entry}
        return ratio({v: median(x) if isinstance(x, list) else x for v, x in found.items()}, name, LORA)

    return value


def _gpu_fold(rows: int, cols: int) -> Value:
    """Time of the NF4 fold over the floor: the largest over all densities and kinds of index sets."""

    def value(results: Results) -> float | None:
        entries = results.gpu().get("fold_nf4", {}).get("results", [])
        found = [
            median(entry["seconds"]) / entry["floor_seconds"]
            for entry in entries
            if entry["op"] == "fold nf4" and (entry["rows"], entry["cols"]) == (rows, cols) and "failed" not in entry
        ]
        return max(found, default=None)

    return value


def _counted(phase: str, variant: str, candidates: float | None = None) -> Value:
    """Counted peak bytes of a phase over those of LoRA, LLaMA-2-7B, NF4, r=64, checkpointing."""

    def value(results: Results) -> float | None:
        counts = (results.get(f"{memory.PREFIX}llama-2-7b_nf4_r64_1x2048") or {}).get("counts", [])
        entry = memory.find(counts, variant, True, candidates)
        return None if entry is None else memory.ratios(counts, entry).get(phase)

    return value


def _alone(r: int, part: str) -> Value:
    return lambda results: ratio_by_round(alone_seconds(results.get(f"alone_smollm2_r{r}_4x128"), part), SPIEL, LORA)


_ALONE = "CPU, SmolLM2-135M, fp32, 4x128, as users run it: step, SpIEL / LoRA"
_STEP = "CPU, SmolLM2-135M, fp32, 4x128, many models in one process: step"
_NF4 = "GPU, 7B NF4, r=64, checkpointing, 1x2048"
_COUNTED = "counted bytes, 7B NF4, r=64, checkpointing, 1x2048: peak"
_BF16 = "GPU, 7B bf16, r=64, 1x2048"
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
    Target(f"{_COUNTED}, SpIEL-MA + SM3 / QLoRA", 0.95, _counted(memory.BETWEEN, SPIEL_MA)),
    Target(f"{_COUNTED}, SpIEL-MA + SM3 / QLoRA, at the first close", 0.95, _counted(memory.FIRST_CLOSE, SPIEL_MA)),
    Target(f"{_COUNTED}, SpIEL-AG + AdamW / QLoRA, between windows", 1.10, _counted(memory.BETWEEN, SPIEL)),
    Target(f"{_COUNTED}, SpIEL-AG + AdamW / QLoRA, window open", 1.20, _counted(memory.OPEN, SPIEL)),
    Target(f"{_COUNTED}, the same with candidates=2", 1.20, _counted(memory.OPEN, SPIEL, 2.0)),
    Target("GPU: NF4 dequantize + scatter-add over its byte floor, 4096x4096", 1.3, _gpu_fold(4096, 4096)),
    Target("GPU: NF4 dequantize + scatter-add over its byte floor, 11008x4096", 1.3, _gpu_fold(11008, 4096)),
)


def _shown(value: float, limit: float) -> str:
    return f"{value:.1%}" if limit < 0.1 else f"{value:.2f}"


def judge(target: Target, results: Results) -> list[str]:
    """One row of the table: label, target, measured value, and "met", "missed" or "not measured"."""
    value = target.value(results)
    if value is None:
        return [target.label, f"<= {_shown(target.limit, target.limit)}", "", "not measured"]
    verdict = "met" if value <= target.limit else "missed"
    return [target.label, f"<= {_shown(target.limit, target.limit)}", _shown(value, target.limit), verdict]


def target_table(results: Results) -> str:
    return markdown(["target", "at most", "measured", ""], [judge(target, results) for target in TARGETS])


_HEAD = """# Measurements

Generated by `python -m benchmarks report` from the JSON files in [results](results), where machine, versions, commit
and every repetition are kept. "Over" is a ratio of medians; below 1 is better. Held-out quality has
[a page of its own](QUALITY.md). Profile indices are drawn
from the row and column profile of SmolLM2's real gradients, uniform ones uniformly; rows without either name are as the
first close chose them from the gradients of real text.
"""


def _section(title: str, result: dict[str, Any] | None, *blocks: str) -> Iterator[str]:
    filled = [block for block in blocks if block]
    if filled:
        yield f"## {title}"
        if result is not None:
            yield f"_{where(result)}_"
        yield from filled


def _plot(results: Results, name: str) -> str:
    title = drawable(results).get(name)
    return "" if title is None else f"![{title}](results/plots/{name}.png)"


def _cpu_alone(results: Results) -> Iterator[str]:
    found = list(results.starting("alone_smollm2").values())
    if found:
        yield from _section(
            "As users run it, on a CPU",
            found[0],
            "SmolLM2-135M, float32, packed text; each run in a process of its own, the methods in turn, SpIEL with its "
            "default cycle. The whole cycle is the one after the first close (steps 6 to 25); its steps 6 to 20 are "
            "those between windows. The table says by how much the first 5 steps, the last of them with SpIEL's first "
            "close, take longer than 5 steps between windows. Seconds and MiB are medians over rounds, "
            "ratios medians of the rounds' ratios.",
            alone_table(results),
            *(f"{setting_name(r['settings'])}:\n\n{alone_rounds_table(r)}" for r in found),
        )


def _cpu_steps(results: Results) -> Iterator[str]:
    found = results.starting("step_smollm2")
    if found:
        yield from _section(
            "Steps on a CPU: many models in one process",
            next(iter(found.values())),
            "All variants of a setting are interleaved in one process, which holds a model for each. LoRA is slower "
            "there than in a process of its own, so ratios over LoRA are not what a user sees; those of the section "
            "before are. The timed steps lie between SpIEL's windows.",
            step_overview(results),
        )
    for result in found.values():
        title = f"Steps on a CPU: {setting_name(result['settings'])}"
        data = result["settings"].get("data", "random ids")
        yield from _section(title, result, f"SmolLM2-135M, float32, {data}.", step_table(result))
    plot = _plot(results, "steps")
    if plot:
        yield plot
    memory = results.starting("memory_smollm2")
    if memory:
        first = next(iter(memory.values()))
        yield from _section(
            "Peak memory on a CPU",
            first,
            "Resident memory of a process of its own, interpreter and libraries included, through SpIEL's first window "
            "and close, and in a step between windows.",
            *(f"{setting_name(r['settings'])}:\n\n{memory_table(r)}" for r in memory.values()),
            _plot(results, "memory"),
        )


def _cpu_parts(results: Results) -> Iterator[str]:
    for result in results.starting("share_smollm2").values():
        title = f"Share of a run that moving deltas takes: {setting_name(result['settings'])}"
        yield from _section(title, result, share_table(result["growth"]))
    for result in results.starting("layer_").values():
        settings = result["settings"]
        title = (
            f"One layer, {settings['rows']}x{settings['cols']}, {settings['density']:.1%}, {settings['tokens']} tokens"
        )
        yield from _section(title, result, layer_table(result, FROZEN))


def _operations(results: Results) -> Iterator[str]:
    result = results.get("ops_cpu")
    if result is None:
        return
    floors = result["floors"]
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in floors["flops_per_second"].items())
    yield from _section(
        "Operations on a CPU",
        result,
        f"Floors: copies {floors['bytes_per_second'] / 1e9:.1f} GB/s, products {rates}.",
        operation_table(result["results"]),
        gather_table(result["results"]),
        "Sampled gather, fitted: time over dense = A (out + in) / (out in) + B density.",
        fit_table(result["results"]),
        _plot(results, "gather"),
    )


def _counts(results: Results) -> Iterator[str]:
    found = list(results.starting(memory.PREFIX).values())
    if found:
        yield from _section(
            "Memory on a GPU, counted",
            found[0],
            "GiB of all live tensors at the peak of each phase of training, on the path that a GPU takes; counted on a "
            "CPU by `python -m benchmarks memory --count`, not measured. LoRA has as many trained values. The first "
            "window and close are those of a fresh adapter, which replaces all positions.",
            *(f"{memory.title(r)}:\n\n{memory.counts_table(r)}" for r in found),
        )


def _gpu(results: Results) -> Iterator[str]:
    measured = [result for result in (results.get(name) for name in GPU_PARTS) if result is not None]
    if measured:
        yield from _section("GPU", measured[0], gpu_table(results.gpu()), _plot(results, "gpu_gather"))


def _compiled(results: Results) -> Iterator[str]:
    result = results.get(COMPILED)
    if result is not None:
        faults = "".join(f"\n- {fault}" for fault in result["faults"])
        yield from _section(
            "Kernels compiled for GPUs that are not there",
            result,
            "Every Triton kernel at the sizes of LLaMA-2-7B, from the launches that training would make. For each "
            "part: registers and bytes of spilled registers per thread, KiB of shared memory per program, machine "
            "instructions; the largest of all compilations of a kernel.",
            compiled_table(result),
            f"Faults:\n{faults}" if faults else "No fault: nothing spills, barriers and matrix instructions are there.",
        )


def results_page(results: Results) -> str:
    """The whole page; results that do not exist are left out."""
    blocks = [_HEAD.strip(), "## Targets", target_table(results)]
    blocks += _cpu_alone(results)
    blocks += _cpu_steps(results)
    blocks += _cpu_parts(results)
    blocks += _operations(results)
    scaling = results.get("scaling_cpu")
    if scaling is not None:
        blocks += _section("Scaling on a CPU", scaling, scaling_table(scaling), _plot(results, "scaling"))
    blocks += _counts(results)
    blocks += _gpu(results)
    blocks += _compiled(results)
    profile = results.get("profile_smollm2")
    if profile is not None:
        blocks += _section("How gradients concentrate", profile, profile_table(profile))
    quality = results.get("quality_smollm2")
    if quality is not None:
        blocks += _section(
            "Held-out loss of one early run",
            quality,
            "60 steps of 4 question-answer pairs at r=16, one seed, made by a script that is gone. It shows where "
            "learning rates lie and decides nothing; [QUALITY.md](QUALITY.md) is the comparison that does.",
            quality_table(results),
        )
    return "\n\n".join(blocks) + "\n"
