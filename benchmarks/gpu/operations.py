"""Measurements of the GPU benchmark that time single operations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spiel_kernels import copy_fold
from spiel_peft.weights.folding import WeightFold

from ..index_sets import INDEX_SETS, draw_index_set
from ..ops.cost_models import fit_rates
from ..ops.measure import Bench, Case, Floors, measure_all, measure_floors
from ..ops.registry import OPERATIONS
from ..timing import DeviceTimer, interleave, median
from .running import Context

SQUARE, WIDE = (4096, 4096), (11008, 4096)
GATHERS = ("gather", "gather dense", "gather compact", "gather entries")
# Deltas of r = 64 are 3.1% of 4096 x 4096 and 2.1% of 11008 x 4096, of r = 16 a quarter of that.
_BUDGET_DENSITIES = (0.03, 0.0078)
_GATHER_DENSITIES = (0.03, 0.01, 0.0035, 0.001, 0.1)
_SECONDS_PER_CASE = 0.15
IN_PLACE, COPY, NO_DELTAS = "in place", "copy", "no deltas"
# A multiple of the number of methods, so that each is first equally often.
_IN_PLACE_ROUNDS = 24


def _shapes(context: Context) -> Sequence[tuple[int, int]]:
    return ((64, 128), (128, 64)) if context.tiny else (SQUARE, WIDE)


def _tokens(context: Context) -> int:
    return 32 if context.tiny else 2048


def _dtypes() -> tuple[str, ...]:
    return ("bfloat16", "float32")


def _measure(context: Context, cases: list[Case]) -> None:
    floors: Floors = measure_floors(context.device, _dtypes(), context.tiny)
    context.keep(floors=floors.to_json())
    bench = Bench(context.device, floors, 0.01 if context.tiny else _SECONDS_PER_CASE)
    results, left_out = measure_all(
        bench, cases, OPERATIONS, context.clock, lambda results: context.keep(results=results)
    )
    context.keep(results=results, cases_left_out=left_out, rates=fit_rates(results, floors.flops_per_second))


def fold_nf4(context: Context) -> None:
    """The kernel that dequantizes NF4 and adds deltas, compared with the time to move its bytes."""
    cases = [
        Case("fold nf4", *shape, density, dtype="bfloat16", indices=kind)
        for shape, density, kind in itertools.product(_shapes(context), _BUDGET_DENSITIES, INDEX_SETS)
    ]
    _measure(context, cases)


def other_folds(context: Context) -> None:
    """The kernel that dequantizes int8 and adds deltas; the adapted weight of a whole NF4 layer."""
    cases = [
        Case(op, *shape, _BUDGET_DENSITIES[0], dtype="bfloat16", indices=kind)
        for op, shape, kind in itertools.product(("fold int8", "fold nf4 layer"), _shapes(context), INDEX_SETS)
    ]
    _measure(context, cases)


def in_place(context: Context) -> None:
    """Writing deltas into a plain weight and taking them out, against copying the weight with deltas.

    Alone, and around a matrix product, which finds a copy in the cache and a weight in place not. Every method is timed
    as the first and as the last of a round.
    """
    timer, entries = DeviceTimer(context.device), []
    cases = list(itertools.product(_shapes(context), _BUDGET_DENSITIES, INDEX_SETS))
    for number, (shape, density, kind) in enumerate(cases):
        if context.clock.expired():
            context.keep(cases_left_out=len(cases) - number)
            return
        k = max(1, round(density * shape[0] * shape[1]))
        indices = draw_index_set(kind, *shape, k, seed=0, device=context.device)
        for product in (True, False):
            entry = {"rows": shape[0], "cols": shape[1], "density": density, "indices": kind, "product": product}
            entries.append({**entry, **_in_place(context, timer, shape, indices, product)})
            context.keep(in_place=entries)
            print(entry, {name: f"{median(s) * 1e6:.1f} us" for name, s in entries[-1]["seconds"].items()}, flush=True)


def _in_place(
    context: Context, timer: DeviceTimer, shape: tuple[int, int], indices: Tensor, product: bool
) -> dict[str, Any]:
    generator = torch.Generator(context.device).manual_seed(0)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=context.device, generator=generator)

    weight, x = randn(*shape).bfloat16(), randn(_tokens(context), shape[1]).bfloat16()
    pairs = [(indices, randn(indices.numel()) * 1e-3)]
    original, copy, fold = weight.clone(), torch.empty_like(weight), WeightFold()
    out = torch.empty(x.shape[0], shape[0], dtype=x.dtype, device=x.device)

    def operation(adapted: Tensor) -> None:
        if product:
            torch.mm(x, adapted.T, out=out)

    actions = {
        IN_PLACE: lambda: fold.run(weight, pairs, operation),
        COPY: lambda: operation(copy_fold(weight, pairs, copy)),
    }
    if product:
        actions[NO_DELTAS] = lambda: operation(weight)
    results = []
    for name in (IN_PLACE, COPY):
        actions[name]()
        results.append(out.clone())
    seconds = interleave(actions, _IN_PLACE_ROUNDS, context.device, measure=timer.seconds)
    sound = torch.equal(weight, original) and (not product or torch.equal(*results))
    return {"seconds": seconds, "sound": sound}


def gather(context: Context) -> None:
    """Every method of the gather across densities, for concentrated and for uniform index sets."""
    cases = [
        Case(op, *shape, density, _tokens(context), "bfloat16", kind)
        for density, kind, shape, op in itertools.product(
            _GATHER_DENSITIES[:2] if context.tiny else _GATHER_DENSITIES, INDEX_SETS, _shapes(context), GATHERS
        )
    ]
    _measure(context, cases)


def growth(context: Context) -> None:
    """Candidate selection, momentum growth and SM3's accumulators."""
    names = ("select", "momentum growth", "sm3 step")
    cases = [
        Case(op, *shape, density, _tokens(context), "bfloat16")
        for op, density, shape in itertools.product(names, _BUDGET_DENSITIES, _shapes(context))
    ]
    _measure(context, cases)


def single_precision(context: Context) -> None:
    """The gather of float32 operands, for models in full precision."""
    cases = [
        Case(op, *_shapes(context)[0], density, _tokens(context), "float32")
        for density, op in itertools.product((0.01, 0.001), GATHERS)
    ]
    _measure(context, cases)


def machine(context: Context) -> None:
    """Name, memory and measured rates of the device."""
    context.keep(floors=measure_floors(context.device, _dtypes(), context.tiny).to_json())
    if context.device.type == "cuda":
        properties = torch.cuda.get_device_properties(context.device)
        context.keep(
            name=properties.name,
            memory_mib=properties.total_memory / 2**20,
            multiprocessors=properties.multi_processor_count,
            cuda=torch.version.cuda,
        )
