"""The format of adapter files: the keys of a delta's tensors, and what each tensor must look like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spiel_kernels import check_index_set

from .state import (
    CANDIDATE_SQUARES,
    CANDIDATE_SUMS,
    CANDIDATES,
    COL,
    MAX_LR,
    PROGRESS,
    ROW,
    STATE_KEYS,
    RunSettings,
    check_settings,
)

# Between the path of a module and the name of a tensor in the keys of an adapter file.
MARKER = ".spiel_delta."

# The name of a bad tensor and a phrase that continues it.
Problem = tuple[str, str]
NOT_FINITE = "has values that are not finite"


# The tensors that an adapter file may hold of a delta.
DELTA_KEYS = ("indices", "values", *STATE_KEYS)


def split_file_key(key: str) -> tuple[str, str] | None:
    """``(module path, tensor name)`` of a saved SpIEL tensor's key, None for any other key."""
    if MARKER not in key:
        return None
    module, _, name = key.rpartition(MARKER)
    return (module, name) if "." not in name else None


def check_indices_and_values(tensors: Mapping[str, Tensor], numel: int | None) -> Problem | None:
    """Say what is wrong with the tensors of a delta in an adapter file, or None when nothing is.

    Args:
        tensors: ``indices`` and ``values``, or neither; others are ignored.
        numel: entries of the weight; None if it is not known.
    """
    indices, values = tensors.get("indices"), tensors.get("values")
    if indices is None and values is None:
        return None
    if indices is None:
        return "indices", "is missing, while its values are there"
    if values is None:
        return "values", "is missing, while its indices are there"
    problem = check_index_set(indices, numel)
    if problem is not None:
        return "indices", problem
    return check_values(values, indices)


def check_values(values: Tensor, indices: Tensor) -> Problem | None:
    """Say what is wrong with values that belong to sound indices ``[k]``, or None when nothing is."""
    if not values.is_floating_point() or values.dtype.itemsize < 2:  # 8-bit numbers cannot be computed with
        return "values", f"must have a floating dtype, got {values.dtype}"
    if values.shape != indices.shape:
        return "values", f"must have shape {tuple(indices.shape)} as its indices have, got {tuple(values.shape)}"
    return ("values", NOT_FINITE) if not_finite({"values": values}) else None


def not_finite(tensors: Mapping[str, Any]) -> list[str]:
    """The names of the floating tensors that have NaN or infinite entries. Waits for the device once.

    Every rank checks its own part of a DTensor. What is no tensor, or is on the meta device, is passed over.
    """
    sound = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta:
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            local = local.float() if local.dtype.itemsize < 2 else local  # PyTorch cannot judge all 8-bit types
            sound[name] = torch.isfinite(local.detach()).all()
    if not sound:
        return []
    device = next(iter(sound.values())).device
    flags = torch.stack([flag.to(device) for flag in sound.values()]).tolist()
    return [name for name, finite in zip(sound, flags, strict=True) if not finite]


def overflows(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether finite entries of a floating tensor become infinite in another floating dtype."""
    if not (tensor.is_floating_point() and dtype.is_floating_point) or tensor.is_meta:
        return False
    if torch.finfo(tensor.dtype).max <= torch.finfo(dtype).max:
        return False
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool((torch.isfinite(local) & ~torch.isfinite(local.to(dtype))).any())


def check_cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Problem | None:
    """Say what is wrong with the values of a delta once they have the dtype that they are loaded as."""
    values = tensors.get("values")
    if values is not None and overflows(values, dtype):
        return "values", f"has values that are too large for {dtype}, the dtype that the model's deltas have"
    return None


def check_training_state(tensors: Mapping[str, Tensor], own: RunSettings) -> Problem | None:
    """Say what is wrong with the training state saved for a delta, or None; the state as a whole is optional.

    Args:
        tensors: by name; only those in `STATE_KEYS` are checked.
        own: settings of the delta that will take over the state.
    """
    if not any(name in tensors for name in STATE_KEYS):
        return None
    problem = _check_progress(tensors.get(PROGRESS), windowed=CANDIDATES in tensors)
    if problem is not None:
        return PROGRESS, problem
    return (
        check_settings(tensors, own)
        or _check_window([tensors.get(name) for name in (CANDIDATES, CANDIDATE_SUMS, CANDIDATE_SQUARES)], own)
        or _check_accumulators(tensors.get(ROW), tensors.get(COL), own)
        or _check_float(MAX_LR, tensors.get(MAX_LR), 1, signed=False)
    )


def _check_progress(progress: Tensor | None, windowed: bool) -> str | None:
    if progress is None:
        return "is missing, while other training state is there"
    if progress.dtype != torch.int64 or tuple(progress.shape) != (5,):
        return f"must be five int64 counters, got {progress.dtype} of shape {tuple(progress.shape)}"
    step, closes, fresh, window_steps, total_steps = progress.tolist()
    out_of_range = min(step - 1, closes, window_steps, total_steps) < 0 or fresh not in (-1, 0, 1)
    if out_of_range or (window_steps > 0 and not windowed):
        return f"has a counter out of range ({progress.tolist()})"
    return None


def _check_window(window: list[Tensor | None], own: RunSettings) -> Problem | None:
    names = (CANDIDATES, CANDIDATE_SUMS, CANDIDATE_SQUARES)
    if all(tensor is None for tensor in window):
        return None
    for name, tensor in zip(names, window, strict=True):
        if tensor is None:
            return name, "is missing, while the rest of its window is there"
    positions, sums, squares = window
    problem = check_index_set(positions, own.numel)
    # Several ranks together may open a window with a shortlist.
    if problem is None and positions.numel() > 2 * own.num_deltas:
        problem = f"holds {positions.numel()} positions, more than the {own.num_deltas} deltas allow"
    if problem is not None:
        return CANDIDATES, problem
    size = positions.numel()
    return _check_float(CANDIDATE_SUMS, sums, size) or _check_float(CANDIDATE_SQUARES, squares, size, signed=False)


def _check_accumulators(row: Tensor | None, col: Tensor | None, own: RunSettings) -> Problem | None:
    if (row is None) != (col is None):
        return (ROW if row is None else COL), "is missing, while the other accumulator is there"
    rows, cols = own.weight_shape
    return _check_float(ROW, row, rows, signed=False) or _check_float(COL, col, cols, signed=False)


def _check_float(name: str, tensor: Tensor | None, size: int, signed: bool = True) -> Problem | None:
    if tensor is None:
        return None
    if not tensor.is_floating_point() or tuple(tensor.shape) != (size,):
        return name, f"must be floating of shape ({size},), got {tensor.dtype} of shape {tuple(tensor.shape)}"
    if not_finite({name: tensor}):
        return name, NOT_FINITE
    # Optimizers take the square root of what these become.
    return None if signed or not bool((tensor < 0).any()) else (name, "has negative values")
