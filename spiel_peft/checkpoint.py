"""Checks a SpIEL adapter file as a whole before any tensor of a model changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spiel_kernels import check_index_set

from .delta import SparseDelta, check_pair
from .training_state import CANDIDATE_SQUARES, CANDIDATE_SUMS, CANDIDATES, COL, MAX_LR, PROGRESS, ROW, STATE_KEYS

MARKER = ".spiel_delta."


def split_file_key(key: str) -> tuple[str, str] | None:
    """``(module path, tensor name)`` of a saved SpIEL tensor's key, None for any other key."""
    if MARKER not in key:
        return None
    module, _, name = key.rpartition(MARKER)
    return (module, name) if "." not in name else None


def check_adapter_tensors(tensors: Mapping[str, Tensor], deltas: Mapping[str, SparseDelta]) -> None:
    """Refuse a damaged or hostile adapter file.

    Args:
        tensors: the file: keys ``<module>.spiel_delta.values``, ``.indices`` and optional training state.
        deltas: the model's deltas by the same module path; modules of the file that the model lacks are checked for
            what can be known without it.

    Raises:
        ValueError: names the first bad tensor and what is wrong with it.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parts = split_file_key(key)
        if parts is not None:
            modules.setdefault(parts[0], {})[parts[1]] = tensor
    for module, entries in modules.items():
        problem = _check_module(entries, deltas.get(module))
        if problem is not None:
            name, what = problem
            raise ValueError(f"The adapter file is refused, nothing was loaded: tensor '{module}{MARKER}{name}' {what}")


def _check_module(entries: dict[str, Tensor], delta: SparseDelta | None) -> tuple[str, str] | None:
    # A file of another budget is PEFT's "size mismatch" (see `size_mismatches`), not a damaged one.
    indices = entries.get("indices")
    fits = delta is not None and indices is not None and delta.k == indices.numel()
    problem = check_pair(entries, delta.numel if fits else None)
    if problem is not None or indices is None:
        return problem
    return _check_training_state(entries, delta, indices.numel())


def _check_training_state(entries: dict[str, Tensor], delta: SparseDelta | None, k: int) -> tuple[str, str] | None:
    present = [name for name in STATE_KEYS if name in entries]
    if not present:
        return None
    if delta is None or delta.k != k:
        return None
    progress = entries.get(PROGRESS)
    if progress is None:
        return PROGRESS, "is missing, while other training state is there"
    if progress.dtype != torch.int64 or tuple(progress.shape) != (5,):
        return PROGRESS, f"must be five int64 counters, got {progress.dtype} of shape {tuple(progress.shape)}"
    step, closes, fresh, window_steps, total_steps = progress.tolist()
    if min(step, closes, window_steps, total_steps) < 0 or fresh not in (-1, 0, 1):
        return PROGRESS, f"has a counter out of range ({progress.tolist()})"
    window = [entries.get(name) for name in (CANDIDATES, CANDIDATE_SUMS, CANDIDATE_SQUARES)]
    if any(t is not None for t in window):
        problem = _check_window(window, delta)
        if problem is not None:
            return problem
    for name, size in ((ROW, delta.rows), (COL, delta.cols)):
        tensor = entries.get(name)
        other = entries.get(COL if name == ROW else ROW)
        if tensor is None and other is not None:
            return name, "is missing, while the other accumulator is there"
        if tensor is not None:
            problem_text = _check_float(tensor, size)
            if problem_text is not None:
                return name, problem_text
    max_lr = entries.get(MAX_LR)
    if max_lr is not None:
        text = _check_float(max_lr, 1)
        if text is not None:
            return MAX_LR, text
    return None


def _check_window(window: list[Tensor | None], delta: SparseDelta) -> tuple[str, str] | None:
    names = (CANDIDATES, CANDIDATE_SUMS, CANDIDATE_SQUARES)
    for name, tensor in zip(names, window, strict=True):
        if tensor is None:
            return name, "is missing, while the rest of its window is there"
    positions, sums, squares = window
    problem = check_index_set(positions, delta.numel)
    if problem is None and positions.numel() > delta.k:
        problem = f"holds {positions.numel()} positions, more than the {delta.k} deltas"
    if problem is not None:
        return CANDIDATES, problem
    for name, tensor in ((CANDIDATE_SUMS, sums), (CANDIDATE_SQUARES, squares)):
        text = _check_float(tensor, positions.numel())
        if text is not None:
            return name, text
    return None


def _check_float(tensor: Tensor, size: int) -> str | None:
    if not tensor.is_floating_point() or tuple(tensor.shape) != (size,):
        return f"must be floating of shape ({size},), got {tensor.dtype} of shape {tuple(tensor.shape)}"
    if not bool(torch.isfinite(tensor).all()):
        return "has values that are not finite"
    return None


class SizeCheck:
    """A one-shot hook that raises PEFT's "size mismatch" before `load_state_dict` copies its first tensor.

    torch copies what fits and reports the rest at the end; here nothing may change unless everything fits. It runs
    after PEFT's `ignore_mismatched_sizes` has taken out what the user does not want.
    """

    def __init__(self, model: nn.Module) -> None:
        self.handle = model.register_load_state_dict_pre_hook(self)

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        self.handle.remove()
        problems = size_mismatches(module, state_dict, prefix)
        if problems:
            raise RuntimeError("Error(s) in loading a SpIEL adapter, nothing was loaded:\n\t" + "\n\t".join(problems))


def size_mismatches(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str = "") -> list[str]:
    """Describe every SpIEL tensor of `state_dict` whose length differs from the model's."""
    problems = []
    for name, child in module.named_modules(remove_duplicate=False):
        if not isinstance(child, SparseDelta):
            continue
        for tensor_name in ("values", "indices"):
            key = f"{prefix}{name}.{tensor_name}"
            found = state_dict.get(key)
            if found is not None and tuple(found.shape) != (child.k,):
                problems.append(
                    f"size mismatch for {key}: the checkpoint has shape {tuple(found.shape)}, the model ({child.k},); "
                    "load it with the config it was saved with"
                )
    return problems
