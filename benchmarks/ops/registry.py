"""The operations of `spiel_kernels`, each with its dense formula and the bytes and FLOPs that it needs at least.

Every entry imports its operation when it is set up. So an operation that is missing, or that this machine cannot run,
does not stop the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..timing import wall_seconds
from .measure import Bench, Case, Prepared

_INDEX, _VALUE = 4, 4  # bytes
_REGROWN = 0.2  # share of the deltas that a close replaces


def _operands(bench: Bench, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Output gradient ``[N, rows]``, input ``[N, cols]``, index set."""
    a = bench.randn(case.tokens, case.rows, dtype=case.torch_dtype, seed=1)
    b = bench.randn(case.tokens, case.cols, dtype=case.torch_dtype, seed=2)
    return a, b, bench.index_set(case)


def _operand_bytes(case: Case) -> int:
    return case.tokens * (case.rows + case.cols) * case.torch_dtype.itemsize


def _largest_difference(ours: Tensor, dense: Tensor) -> float:
    """The largest difference of two tensors, over the largest magnitude in `dense`."""
    dense = dense.float()
    return float((ours.float() - dense).abs().max() / dense.abs().max().clamp_min(1e-30))


def _share_missing(ours: Tensor, dense: Tensor) -> float:
    """Share of the positions in `dense` that `ours` lacks."""
    return 1.0 - float(torch.isin(dense, ours).float().mean())


def _fold(bench: Bench, case: Case) -> Prepared:
    """Write the deltas into the weight and take them out again: what a fold adds to a matrix product."""
    from spiel_peft.weights.folding import WeightFold

    indices, weight = bench.index_set(case), bench.randn(case.rows, case.cols, dtype=case.torch_dtype)
    values = bench.randn(case.k) * 1e-3
    wide = indices.to(torch.int64)
    fold = WeightFold()

    def run() -> None:
        fold.run(weight, [(indices, values)], lambda adapted: None)

    def dense() -> Tensor:
        return weight.flatten().scatter_add(0, wide, values.to(weight.dtype))

    entry = weight.element_size()
    return Prepared(run, dense, case.k * ((_INDEX + _VALUE + 3 * entry) + (_INDEX + 2 * entry)))


def _copy_fold(bench: Bench, case: Case) -> Prepared:
    """Make a copy of the weight with the deltas, in memory that is allocated already."""
    from spiel_kernels import copy_fold

    indices, weight = bench.index_set(case), bench.randn(case.rows, case.cols, dtype=case.torch_dtype)
    values = bench.randn(case.k) * 1e-3
    wide = indices.to(torch.int64)
    out = torch.empty_like(weight)

    def dense() -> Tensor:
        return weight.flatten().scatter_add(0, wide, values.to(weight.dtype)).view_as(weight)

    nbytes = 2 * weight.nbytes + case.k * (_INDEX + _VALUE + 2 * weight.element_size())
    return Prepared(lambda: copy_fold(weight, [(indices, values)], out), dense, nbytes, error=_largest_difference)


def _gather(method: str) -> Callable[[Bench, Case], Prepared]:
    """Gather the gradient by one method; on a GPU its plan is cached after the first call, as during a cycle."""

    def prepare(bench: Bench, case: Case) -> Prepared:
        from spiel_kernels import gather_outer

        a, b, indices = _operands(bench, case)
        wide = indices.to(torch.int64)
        return Prepared(
            lambda: gather_outer(a, b, indices, method),
            lambda: (a.T @ b).flatten().take(wide),
            _operand_bytes(case) + case.k * (_INDEX + _VALUE),
            2.0 * case.tokens * case.k,
            _largest_difference,
            _plan_notes(bench, case, indices, method),
        )

    return prepare


def _plan_notes(bench: Bench, case: Case, indices: Tensor, method: str) -> dict[str, Any]:
    """The plan that the gather makes once per cycle, and its cost; empty on a CPU unless the method needs a plan."""
    from spiel_kernels.outer_plan import PLANNED_METHODS, plan_outer

    if method not in PLANNED_METHODS and bench.device.type == "cpu":
        return {}

    def make() -> Any:
        return plan_outer(indices, case.rows, case.cols, case.tokens, case.torch_dtype, method=method)

    plan = make()
    compact = plan.method == "compact"
    return {
        "method": plan.method,
        **({"tile_shape": list(plan.layout), "tiles": plan.tiles.block.numel()} if compact else {}),
        "plan_seconds": wall_seconds(make, bench.device),
        "plan_bytes": plan.nbytes,
        "product_share": plan.product_share,
    }


def _select(bench: Bench, case: Case) -> Prepared:
    """Choose candidates: the k largest entries of the weight gradient."""
    from spiel_kernels import topk_outer

    a, b, _ = _operands(bench, case)

    def dense() -> Tensor:
        return torch.topk((a.T @ b).abs().flatten(), case.k, sorted=False).indices

    nbytes = _operand_bytes(case) + case.k * _INDEX
    # Rounding of a half-precision product swaps entries near the threshold, so a small share may be missing.
    return Prepared(lambda: topk_outer(a, b, case.k), dense, nbytes, 2.0 * case.tokens * case.numel, _share_missing)


def _momentum(bench: Bench, case: Case) -> Prepared:
    """Momentum growth at a close: choose the inactive positions with the largest row x col."""
    from spiel_kernels import top_outer_positions

    indices = bench.index_set(case)
    wide, count = indices.to(torch.int64), max(1, int(_REGROWN * case.k))
    row, col = bench.randn(case.rows, seed=3).square(), bench.randn(case.cols, seed=4).square()

    def dense() -> Tensor:
        scores = row.double().log()[:, None] + col.double().log()
        scores.view(-1)[wide] = -torch.inf
        return torch.topk(scores.flatten(), count, sorted=False).indices

    nbytes = _VALUE * (case.rows + case.cols) + case.k * _INDEX + count * _INDEX
    return Prepared(lambda: top_outer_positions(row, col, indices, count), dense, nbytes, error=_share_missing)


def _sm3(bench: Bench, case: Case) -> Prepared:
    """Update SM3's accumulators; the dense formula has a dense gradient."""
    from spiel_kernels import sm3_accumulate_

    indices, gradient = bench.index_set(case), bench.randn(case.k)
    row, col = bench.randn(case.rows, seed=3).square(), bench.randn(case.cols, seed=4).square()
    dense_gradient = torch.zeros(case.numel, device=bench.device)
    dense_gradient[indices.to(torch.int64)] = gradient
    dense_gradient = dense_gradient.view(case.rows, case.cols)

    def dense() -> Tensor:
        nu = torch.minimum(row[:, None], col) + dense_gradient.square()
        return torch.maximum(row, nu.amax(1)).sum() + torch.maximum(col, nu.amax(0)).sum()

    nbytes = case.k * (_INDEX + _VALUE) + 2 * _VALUE * (case.rows + case.cols)
    return Prepared(lambda: sm3_accumulate_(row, col, indices, gradient), dense, nbytes)


def _fold_nf4(bench: Bench, case: Case) -> Prepared:
    """Dequantize NF4 with double quantization and add the deltas, into a workspace."""
    from spiel_kernels.quantized import dequantize_fold_4bit
    from spiel_kernels.quantized_layout import quantize_4bit

    weight = quantize_4bit(bench.randn(case.rows, case.cols, dtype=case.torch_dtype) * 0.02)
    indices, values = bench.index_set(case), bench.randn(case.k) * 1e-3
    wide = indices.to(torch.int64)
    out = torch.empty(case.rows, case.cols, dtype=case.torch_dtype, device=bench.device)
    dequantize, notes = _dequantizer(weight)

    def dense() -> Tensor:
        return dequantize().flatten().scatter_add(0, wide, values.to(out.dtype)).view_as(out)

    scales = weight.absmax.nbytes + (weight.nested.absmax.nbytes if weight.nested is not None else 0)
    nbytes = case.numel / 2 + scales + out.nbytes + case.k * (_INDEX + _VALUE)
    return Prepared(
        lambda: dequantize_fold_4bit(weight, [(indices, values)], out), dense, nbytes, 0.0, _largest_difference, notes
    )


def _dequantizer(weight: Any) -> tuple[Callable[[], Tensor], dict[str, str]]:
    """Dequantizes `weight` with bitsandbytes if it is installed, otherwise with plain PyTorch; with a note of which."""
    try:
        from bitsandbytes.functional import QuantState, dequantize_4bit
    except ImportError:
        from spiel_kernels.quantized_layout import dequantize_4bit as plain

        return (lambda: plain(weight)), {"dense_formula": "plain PyTorch dequantization"}
    from spiel_kernels.quantized_layout import code_table

    nested = weight.nested
    state = QuantState(
        absmax=weight.absmax,
        shape=torch.Size(weight.shape),
        code=code_table("nf4", weight.packed.device),
        blocksize=weight.blocksize,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=nested.offset,
        state2=QuantState(absmax=nested.absmax, code=nested.code, blocksize=nested.blocksize, dtype=torch.float32),
    )
    packed = weight.bytes.view(-1, 1)
    return (lambda: dequantize_4bit(packed, state)), {"dense_formula": "bitsandbytes' dequantization"}


def _fold_nf4_layer(bench: Bench, case: Case) -> Prepared:
    """Make the adapted weight as a 4-bit layer does in each pass; on a CPU, bitsandbytes dequantizes."""
    import bitsandbytes as bnb

    from spiel_peft.weights.quantized import adapted_in_workspace

    from ..bases import nf4_linear

    layer = nf4_linear(bench.randn(case.rows, case.cols, dtype=case.torch_dtype) * 0.02, case.torch_dtype)
    indices, values = bench.index_set(case), bench.randn(case.k) * 1e-3
    wide = indices.to(torch.int64)

    def dense() -> Tensor:
        base = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return base.flatten().scatter_add(0, wide, values.to(base.dtype)).view_as(base)

    nbytes = case.numel * (0.5 + 1 / 64 + case.torch_dtype.itemsize) + case.k * (_INDEX + _VALUE)

    def run() -> Tensor:
        with adapted_in_workspace(layer, [(indices, values)], case.torch_dtype) as weight:
            return weight  # compared before another operation writes into the workspace

    return Prepared(run, dense, nbytes, error=_largest_difference)


def _fold_int8(bench: Bench, case: Case) -> Prepared:
    """Dequantize 8-bit rows and add the deltas, into a workspace."""
    from spiel_kernels.quantized import dequantize_fold_8bit
    from spiel_kernels.quantized_layout import dequantize_8bit, quantize_8bit

    packed, scales = quantize_8bit(bench.randn(case.rows, case.cols) * 0.02)
    indices, values = bench.index_set(case), bench.randn(case.k) * 1e-3
    wide = indices.to(torch.int64)
    out = torch.empty(case.rows, case.cols, dtype=case.torch_dtype, device=bench.device)

    def dense() -> Tensor:
        base = dequantize_8bit(packed, scales).to(out.dtype)
        return base.flatten().scatter_add(0, wide, values.to(out.dtype)).view_as(out)

    nbytes = packed.nbytes + scales.nbytes + out.nbytes + case.k * (_INDEX + _VALUE)
    return Prepared(
        lambda: dequantize_fold_8bit(packed, scales, [(indices, values)], out),
        dense,
        nbytes,
        error=_largest_difference,
    )


OPERATIONS: dict[str, Callable[[Bench, Case], Prepared]] = {
    "fold": _fold,
    "copy fold": _copy_fold,
    "gather": _gather("auto"),
    "gather sampled": _gather("sampled"),
    "gather dense": _gather("dense"),
    "gather compact": _gather("compact"),
    "gather entries": _gather("entries"),
    "select": _select,
    "momentum growth": _momentum,
    "sm3 step": _sm3,
    "fold nf4": _fold_nf4,
    "fold nf4 layer": _fold_nf4_layer,
    "fold int8": _fold_int8,
}
