"""Parts of the GPU benchmark that measure single operations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ..index_sets import INDEX_SETS
from ..ops.cost_models import fit_rates
from ..ops.measure import Bench, Case, Floors, measure_all, measure_floors
from ..ops.registry import OPERATIONS
from .parts import Context

SQUARE, WIDE = (4096, 4096), (11008, 4096)
GATHERS = ("gather", "gather dense", "gather compact", "gather entries")
# Deltas of r = 64 are 3.1% of 4096 x 4096 and 2.1% of 11008 x 4096, of r = 16 a quarter of that.
_BUDGET_DENSITIES = (0.03, 0.0078)
_GATHER_DENSITIES = (0.03, 0.01, 0.0035, 0.001, 0.1)
_SECONDS_PER_CASE = 0.15


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


def dequantize(context: Context) -> None:
    """NF4 with double quantization and int8: dequantize and add deltas, compared with the time to move the bytes."""
    cases = [
        Case(op, *shape, density, dtype="bfloat16", indices=kind)
        for op, kind, density, shape in itertools.product(
            ("fold nf4", "fold int8", "fold nf4 layer"), INDEX_SETS, _BUDGET_DENSITIES, _shapes(context)
        )
    ]
    _measure(context, cases)


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
    """Candidate selection, momentum growth, SM3's accumulators and folding."""
    names = ("select", "momentum growth", "sm3 step", "fold", "copy fold")
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
