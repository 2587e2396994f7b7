"""Plans are made once per index set, which changes once per cycle, and used in every backward pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .outer_plan import OuterPlan, plan_outer

# What plans are chosen for, whatever a batch brings: a resumed run must make the choice of the run it continues.
NOMINAL_TOKENS = 2048

_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()


def plan_for(indices: Tensor, rows: int, cols: int, dtype: torch.dtype, method: str = "auto") -> OuterPlan:
    """`plan_outer`, remembered as long as the tensor `indices` lives and is not written to (other than by ``.data``).

    Args:
        indices: ``[k]`` sorted, unique flat positions in ``[rows, cols]``.
        dtype: of the operands, the wider one if they differ.
        method: "auto", "compact", "dense" or "entries".
    """
    if indices.is_inference():  # has no version
        return plan_outer(indices, rows, cols, NOMINAL_TOKENS, dtype, method)
    key = (indices._version, rows, cols, dtype, method)
    known = _plans.get(indices)
    if known is not None and known[0] == key:
        return known[1]
    plan = plan_outer(indices, rows, cols, NOMINAL_TOKENS, dtype, method)
    _plans[indices] = (key, plan)
    return plan
