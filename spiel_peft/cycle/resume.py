"""Keeps training state in the state dicts of optimizers, so that saving model and optimizer is enough to resume.

`model.state_dict()` has the same keys for a trained and a loaded adapter, so it cannot hold a window. An optimizer's
can: extra keys of a parameter group are saved and loaded with it. Loaded state stays in the optimizer's groups until
the deltas take it over: in the first backward pass, which needs the candidates of an open window, or else at the
first step.
"""

from __future__ import annotations

import gc
import io
import warnings
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ..adapter_format import check_training_state
from ..call_stack import live_objects
from ..delta import LIVE_DELTAS, AdapterRun, SparseDelta
from ..growth import get_growth_criterion
from ..sharding import is_sharded
from ..state import GROWTH, MAX_LR, PROGRESS, SETTINGS, STATE_KEYS, TrainingState
from .agreement import checksum
from .close import in_window
from .steps import any_nonzero, inner_optimizers

# The key in a parameter group; its value is a list with one dict for each delta that has been stepped.
GROUP_KEY = "spiel_training_state"
# Small tensors are kept as lists, so that groups can be compared, printed and exported.
_LISTS = {PROGRESS: torch.int64, MAX_LR: torch.float64, SETTINGS: torch.int64, GROWTH: torch.uint8}
_CARRIERS: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def carry(optimizer: torch.optim.Optimizer) -> None:
    """Make `optimizer.state_dict()` hold the training state of the deltas that the optimizer steps, from now on.

    The same is done for optimizers inside it, as those around others often save the state dict of the inner one.
    """
    if optimizer in _CARRIERS:
        return
    _CARRIERS.add(optimizer)
    if hasattr(optimizer, "_optimizer_state_dict_post_hooks"):
        optimizer.register_state_dict_post_hook(_add_entries)
    for _, inner in inner_optimizers(optimizer):
        carry(inner)


def _add_entries(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    live = _live_by_parameter()
    for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        if GROUP_KEY in group:
            continue  # loaded state that no delta has taken over yet is in the packed group already
        held = [(position, live.get(id(parameter))) for position, parameter in enumerate(group["params"])]
        entries = [_entry(position, delta) for position, delta in held if delta is not None and delta.state.step]
        if any(delta is not None and is_sharded(delta) for _, delta in held):
            packed[GROUP_KEY] = _as_bytes(entries)
        elif entries:
            packed[GROUP_KEY] = entries


def _entry(position: int, delta: SparseDelta) -> dict[str, Any]:
    """The training state of a delta in numbers, strings and tensors, as `torch.load(weights_only=True)` demands."""
    tensors = delta.training_tensors()
    return {
        "position": position,  # in the group's params
        "module": delta.module_name,
        "indices": int(checksum(delta.indices)),
        **{name: tensor.tolist() if name in _LISTS else tensor for name, tensor in tensors.items()},
    }


def _as_bytes(entries: list[dict[str, Any]]) -> bytes:
    """Entries as bytes: checkpoints of sharded models load only into a state dict with the same keys and sizes."""
    buffer = io.BytesIO()
    torch.save(entries, buffer)
    return buffer.getvalue()


def seek(delta: SparseDelta) -> None:
    """Give the deltas of a run the training state with which optimizers were loaded; called in the first backward pass.

    The optimizer that will step a delta is unknown before its step, and PyTorch keeps no list of optimizers. So all
    objects of the garbage collector are searched, once for each run that may be a resumed one (about 0.2 s).

    Raises:
        ValueError: see `take_up`.
    """
    deltas = delta.run.deltas()
    for sibling in deltas:
        sibling.state.sought = True
    # Values may be loaded past the module, but then they are no longer zero. A backward pass must not communicate.
    if all(sibling.untouched for sibling in deltas) and not any_nonzero([sibling.values for sibling in deltas]):
        return
    values = {id(d.values) for d in deltas}
    loaded = _loaded_optimizers(values)
    if _contested(loaded, values):
        loaded.clear()
        gc.collect()  # frees optimizers that are no longer in use
        loaded = _loaded_optimizers(values)
    contested = _contested(loaded, values)
    for optimizer in loaded:
        # If several loaded optimizers hold a delta, the one that steps it decides.
        if not contested & _parameters(optimizer):
            take_up(optimizer)


def _contested(optimizers: list[torch.optim.Optimizer], values: set[int]) -> set[int]:
    """The values that several of these optimizers hold, other than by sharing a group."""
    groups = {id(group): group for optimizer in optimizers for group in _loaded_groups(optimizer)}
    holders = Counter(p for group in groups.values() for p in {id(parameter) for parameter in group["params"]} & values)
    return {parameter for parameter, count in holders.items() if count > 1}


def _loaded_optimizers(values: set[int]) -> list[torch.optim.Optimizer]:
    """Optimizers that were loaded with state for one of these parameters, by id."""
    # The carriers are known even after gc.freeze().
    distinct = {id(optimizer): optimizer for optimizer in (*_CARRIERS, *live_objects(torch.optim.Optimizer))}
    return [optimizer for optimizer in distinct.values() if _parameters(optimizer) & values]


def _parameters(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in _loaded_groups(optimizer) for parameter in group["params"]}


def _loaded_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    # Wrappers have no groups of their own.
    return [group for group in vars(optimizer).get("param_groups", ()) if GROUP_KEY in group]


def take_up(optimizer: torch.optim.Optimizer, at_step: bool = False) -> None:
    """Give deltas the training state that was loaded with the optimizer, if any.

    Args:
        optimizer: any optimizer.
        at_step: whether its step is about to begin, so that a backward pass has taken place already.

    Raises:
        ValueError: the state belongs to another run than the model's, or is damaged; nothing was changed then.
    """
    groups = [group for group in optimizer.param_groups if GROUP_KEY in group]
    if not groups:
        return
    live = _live_by_parameter()
    found = [
        (_delta_at(group["params"], entry, live), entry) for group in groups for entry in _entries_of(group[GROUP_KEY])
    ]
    for delta, entry in found:
        problem = "holds no SpIEL delta at its place" if delta is None else _problem_with(entry, delta)
        if problem is not None:
            raise ValueError(
                f"The training state that {type(optimizer).__name__} was loaded with is refused, nothing was changed: "
                f"that of module {entry.get('module')!r} {problem}"
            )
    new = [(delta, entry) for delta, entry in found if delta.state.step == 0]
    late = {delta.run: None for delta, entry in new if at_step and _misses_this_step(delta, entry)}
    for delta, entry in new:
        _give(delta, entry)
    for delta, _ in found:
        delta.state.with_optimizer = True
    for group in groups:
        del group[GROUP_KEY]
    carry(optimizer)
    for run in late:
        _warn_late(run)


def _live_by_parameter() -> dict[int, SparseDelta]:
    return {id(delta.values): delta for delta in LIVE_DELTAS}


def _entries_of(saved: Any) -> list[dict[str, Any]]:
    if isinstance(saved, bytes):
        try:
            saved = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
        except Exception:
            saved = None
    if not isinstance(saved, list) or not all(isinstance(entry, dict) for entry in saved):
        raise ValueError(f"The optimizer's state is refused: its entry {GROUP_KEY!r} is damaged")
    return saved


def _delta_at(parameters: list[Tensor], entry: dict[str, Any], live: dict[int, SparseDelta]) -> SparseDelta | None:
    position = entry.get("position")
    if not isinstance(position, int) or not 0 <= position < len(parameters):
        return None
    return live.get(id(parameters[position]))


def _problem_with(entry: dict[str, Any], delta: SparseDelta) -> str | None:
    """Why this entry cannot be the state of `delta`; None if it can."""
    if entry.get("module") != delta.module_name:
        return (
            f"meets module {delta.module_name!r} at its place in the optimizer; resume on the model and with the "
            "target_modules that the checkpoint was made with"
        )
    try:
        tensors = _tensors_of(entry)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        return f"is damaged ({error})"
    problem = check_training_state(tensors, delta.settings) if PROGRESS in tensors else (PROGRESS, "is missing")
    if problem is not None:
        return f"{problem[1]} ({problem[0]})"
    step, closes = tensors[PROGRESS].tolist()[:2]
    state = delta.state
    if state.step and (state.step, state.closes) != (step, closes):
        return (
            f"was saved after step {step}, while the adapter is at step {state.step}; load model and optimizer from "
            "the same checkpoint"
        )
    if entry.get("indices") != int(checksum(delta.indices)):
        return "belongs to other indices than the model has; load model and optimizer from the same checkpoint"
    return None


def _tensors_of(entry: dict[str, Any]) -> dict[str, Tensor]:
    """Training state as named tensors, as in an adapter file; a TypeError if other objects have these names."""
    out = {}
    for name in STATE_KEYS:
        if name in entry:
            out[name] = torch.tensor(entry[name], dtype=_LISTS[name]) if name in _LISTS else entry[name]
            if not isinstance(out[name], Tensor):
                raise TypeError(f"{name} is a {type(out[name]).__name__}")
    return out


def _give(delta: SparseDelta, entry: dict[str, Any]) -> None:
    delta.state = TrainingState.from_tensors(_tensors_of(entry), delta.values.device)
    delta.state.sought = True
    delta.untouched = False


def _misses_this_step(delta: SparseDelta, entry: dict[str, Any]) -> bool:
    """Whether a backward pass of an open window took place before the window was loaded."""
    config = delta.run.config
    if delta.state.current.graph_task == -1 or not get_growth_criterion(config.growth).gathers:
        return False
    return in_window(entry[PROGRESS][0], config.regrow_every, config.accumulation_steps)


def _warn_late(run: AdapterRun) -> None:
    warnings.warn(
        f"The training state of adapter {run.adapter_name!r} was found with its optimizer only at the step: the "
        "open window misses this step's gradients. Load the optimizer before the first backward pass; if you "
        "did, wrap it in SpIELOptimizer, or do not call gc.freeze() before.",
        stacklevel=2,
    )
