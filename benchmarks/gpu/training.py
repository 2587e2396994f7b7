"""Measurements of the GPU benchmark that train: slices of a few decoder layers, and models of full depth."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import spiel_peft
from spiel_peft import SpIELConfig, delta

from .. import layer
from ..bases import LLAMA_2_7B, LLAMA_2_13B, TINY, BaseSpec, LlamaShape
from ..index_sets import ProfileSampler
from ..stepping import (
    LORA,
    LOWER_BOUND,
    Failures,
    begin_device_peak,
    device_peak,
    free_memory,
    measure_cycles,
    print_times,
    set_up,
    step_seconds,
    warm_up,
)
from ..timing import Clock, median, synchronize, wall_seconds
from ..variants import FIRST_CLOSE, Budget, build, cycling_run, place_deltas
from .kernel_times import kernel_times
from .running import Context

AG, MA = "SpIEL-AG, profile indices", "SpIEL-MA, SM3, profile indices"
UNIFORM = "SpIEL-AG, uniform indices"
DENSE, DROPOUT, FULL = "dense formula", "LoRA, dropout 0.05", "full fine-tuning"
SLICE_VARIANTS = (LOWER_BOUND, LORA, AG, MA, UNIFORM, DROPOUT, DENSE)
_REPETITIONS = 8
_FULL_REPETITIONS = 5


@dataclass(frozen=True)
class StepSetting:
    """Size of the batch, and whether decoder layers recompute their activations in the backward pass."""

    batch_size: int
    tokens: int
    checkpointing: bool

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.tokens}{', chkpt' if self.checkpointing else ''}"


SETTINGS = (
    StepSetting(1, 2048, True),
    StepSetting(4, 512, True),
    StepSetting(1, 2048, False),
    StepSetting(4, 512, False),
)


def _settings(context: Context) -> Sequence[StepSetting]:
    return (StepSetting(1, 32, True), StepSetting(2, 16, False)) if context.tiny else SETTINGS


def _depths(context: Context) -> tuple[int, int]:
    """Numbers of decoder layers of the deep and the short slice."""
    return (2, 1) if context.tiny else (4, 2)


def _base(context: Context, shape: LlamaShape, nf4: bool) -> BaseSpec:
    return BaseSpec(shape=TINY if context.tiny else shape, dtype="bfloat16", nf4=nf4, device=str(context.device))


def _slice(
    context: Context,
    spec: BaseSpec,
    layers: int,
    r: int,
    settings: Iterable[StepSetting],
    names: Sequence[str],
    entries: list[dict[str, Any]],
) -> None:
    """Time steps of a model with few decoder layers; adds one entry per setting to `entries` and saves it at once."""
    base = spec.sliced(layers).build()
    failures: Failures = {}
    with _first_positions_on(context.device):
        runs = set_up(lambda: copy.deepcopy(base), names, Budget.of_rank(r), failures)
    for number, setting in enumerate(settings):
        # Without time for its warm-up, a setting is left out.
        if number and context.clock.expired():
            break
        batches = spec.batches(setting.batch_size, setting.tokens)
        for run in runs.values():
            run.use_checkpointing(setting.checkpointing)
        warm_up(runs, batches, failures, None if number == 0 else 2)
        seconds = step_seconds(runs, batches, 2 if context.tiny else _REPETITIONS, context.clock)
        entries.append({"layers": layers, "r": r, **asdict(setting), "seconds": seconds, "failed": dict(failures)})
        context.keep(steps=entries)
        print_times(f"{layers} layers, r={r}, {setting}", seconds, failures)
    runs.clear()
    free_memory()


def _slices(context: Context, shape: LlamaShape, nf4: bool, ranks: Sequence[int], names: Sequence[str]) -> None:
    spec, entries = _base(context, shape, nf4), []
    deep, short = _depths(context)
    context.keep(base=asdict(spec))
    for number, r in enumerate((2,) if context.tiny else ranks):
        if number and context.clock.expired():
            context.keep(ranks_left_out=list(ranks[number:]))
            return
        _slice(context, spec, deep, r, _settings(context), names, entries)
        if number == 0:
            # Two depths give the time of one decoder layer, and so a prediction for the whole model.
            first = _settings(context)[:1]
            _slice(context, spec, short, r, first, (LOWER_BOUND, LORA, AG, MA), entries)


def steps_7b_nf4(context: Context) -> None:
    """Slices of LLaMA-2-7B, NF4 with double quantization."""
    _slices(context, LLAMA_2_7B, True, (64, 16), SLICE_VARIANTS)


def steps_7b_bf16(context: Context) -> None:
    """Slices of LLaMA-2-7B in bfloat16."""
    _slices(context, LLAMA_2_7B, False, (64, 16), (*SLICE_VARIANTS, FULL))


def steps_13b_nf4(context: Context) -> None:
    """Slices of LLaMA-2-13B, NF4 with double quantization."""
    _slices(context, LLAMA_2_13B, True, (64,), (LOWER_BOUND, LORA, AG, MA, UNIFORM))


@functools.lru_cache(maxsize=1)
def _kept_base(spec: BaseSpec) -> Any:
    """The model of full depth, for one variant after the other."""
    return spec.build()


def whole(model: str, variant: str) -> Callable[[Context], None]:
    """A measurement of one variant on LLaMA-2-7B at full depth: peak memory, first steps, step times, kernels.

    Args:
        model: "7b_nf4" or "7b_bf16".
    """

    def measure(context: Context) -> None:
        spec = _base(context, LLAMA_2_7B, model == "7b_nf4")
        r, setting = 2 if context.tiny else 64, _settings(context)[0]
        context.keep(model=model, variant=variant, base=asdict(spec), r=r, **asdict(setting))
        try:
            _measure_whole(context, spec, variant, r, setting)
        except Exception:
            _kept_base.cache_clear()  # the adapter may still be in it
            raise

    return measure


def _measure_whole(context: Context, spec: BaseSpec, variant: str, r: int, setting: StepSetting) -> None:
    device, clock = context.device, Clock()
    base = _kept_base(spec)
    synchronize(device)
    context.keep(build_seconds=clock.elapsed(), loaded_mib=begin_device_peak(device))
    clock = Clock()
    with _first_positions_on(device):
        run = build(variant, base, Budget.of_rank(r))
    run.use_checkpointing(setting.checkpointing)
    context.keep(set_up_seconds=clock.elapsed(), trainable=run.trainable)
    batches = spec.batches(setting.batch_size, setting.tokens)
    # SpIEL's first window and close are among these steps; LoRA takes as many.
    first = [
        wall_seconds(lambda number=number: run.step(batches[number % len(batches)]), device)
        for number in range(FIRST_CLOSE + 1)
    ]
    context.keep(first_seconds=first, peak_mib=device_peak(device))
    begin_device_peak(device)
    if run.warmup_steps > FIRST_CLOSE:
        # Gradients of random weights are not concentrated: move the deltas to where a trained model's would be.
        place_deltas(run.model, ProfileSampler.measured())
    run.step(batches[0])
    repetitions = 2 if context.tiny else _FULL_REPETITIONS
    seconds = [wall_seconds(lambda: run.step(batches[-1]), device) for _ in range(repetitions)]
    context.keep(peak_between_windows_mib=device_peak(device), seconds=seconds)
    print(f"{variant}: {median(seconds) * 1e3:.0f} ms, peak {context.result['peak_mib']:.0f} MiB", flush=True)
    context.keep(profile=kernel_times(lambda: run.step(batches[-1]), device))
    run.model.unload()


@contextmanager
def _first_positions_on(device: torch.device) -> Iterator[None]:
    """Draw the first positions of new deltas on a device; a CPU core takes 20 s for LLaMA-2-7B.

    Positions differ from those of a user's run. The first close replaces them all.
    """
    drawn_on_cpu = delta.first_positions

    def draw(config: SpIELConfig, module_name: str, numel: int, k: int) -> Tensor:
        positions = torch.randint(numel, (k + k // 4 + 16,), device=device).unique()
        if positions.numel() < k:  # a dense delta
            return drawn_on_cpu(config, module_name, numel, k)
        kept = torch.randperm(positions.numel(), device=device)[:k]
        return positions[kept].sort().values.cpu()

    delta.first_positions = draw
    try:
        yield
    finally:
        delta.first_positions = drawn_on_cpu


def compile_kernels(context: Context) -> None:
    """What `spiel_peft.warm_up` compiles for LLaMA-2-7B, of which one layer has every kind of matrix."""
    entries = {}
    for nf4 in (True, False):
        if entries and context.clock.expired():
            return
        base = _base(context, LLAMA_2_7B, nf4).sliced(1).build()
        run = build("SpIEL-AG", base, Budget.of_rank(2 if context.tiny else 64))
        clock = Clock()
        kernels = spiel_peft.warm_up(run.model, torch.bfloat16)
        entries["nf4" if nf4 else "bf16"] = {"kernels": kernels, "seconds": clock.elapsed()}
        context.keep(compiled=entries)
        del base, run


def share(context: Context) -> None:
    """Share of a run that windows and closes take, on slices of LLaMA-2-7B.

    The weights are random, so the index sets that regrowing chooses are spread evenly.
    """
    growths: dict[str, Any] = {}
    for nf4 in (True,) if context.tiny else (True, False):
        spec = _base(context, LLAMA_2_7B, nf4)
        base = spec.sliced(_depths(context)[0]).build()
        setting = _settings(context)[0]
        batches = spec.batches(setting.batch_size, setting.tokens)
        for growth in ("accumulated_gradient",) if context.tiny else ("accumulated_gradient", "momentum"):
            if growths and context.clock.expired():
                return
            with _first_positions_on(context.device):
                run = cycling_run(growth, copy.deepcopy(base), Budget.of_rank(2 if context.tiny else 64))
            run.use_checkpointing(setting.checkpointing)
            measured = measure_cycles(run, growth, batches, 1 if context.tiny else 2, context.clock)
            growths[f"{growth}, {'nf4' if nf4 else 'bf16'}"] = measured
            context.keep(growth=growths)
            del run
            free_memory()


def one_layer(context: Context) -> None:
    """Forward and backward pass of one linear layer."""
    sizes = (64, 48, 0.05, 32) if context.tiny else (4096, 4096, 0.01, 2048)
    repetitions = 2 if context.tiny else 20
    context.keep(**layer.measure(*sizes, repetitions, str(context.device), torch.bfloat16, context.clock))
