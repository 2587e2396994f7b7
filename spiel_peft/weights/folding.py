"""The transient fold: deltas are written into a plain base weight for the length of one operation, then taken out.

Nothing that runs after the operation sees deltas in a base weight: not another model on the same storage, not a copy,
not the handler of an exception. Before the first byte is written the layer holds the originals, and it forgets them
last. So whatever ends an operation, even an interrupt between two instructions, the originals are put back: at once,
or, after two interrupts in a row, at the next use of the layer (`WeightFold.undo_interrupted`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from spiel_kernels import apply_deltas, copy_fold, read_entries, sum_entries, union_positions, write_entries
from spiel_kernels.workspace import workspace

Pairs = Sequence[tuple[Tensor, Tensor]]
T = TypeVar("T")

# One lock for each storage that is written to, kept alive by the folds that use it: two threads may run models that
# share a weight.
_LOCKS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_TABLE_LOCK = threading.Lock()


class _Open(NamedTuple):
    """A fold under way."""

    weight: Tensor
    positions: Tensor  # int64 [u]
    originals: Tensor  # [u], the weight's dtype
    adapted: Tensor  # [u], what was written


class WeightFold:
    """Writes deltas into a plain weight for the length of one operation; each layer has one."""

    def __init__(self) -> None:
        self._open: _Open | None = None
        self._lock: Any = None
        self._address: int | None = None

    def run(self, weight: Tensor, pairs: Pairs, operation: Callable[[Tensor], T]) -> T:
        """Run an operation on a weight with deltas in it.

        Another thread that adapts a weight of the same storage waits.

        Args:
            weight: a parameter's ``.data``, so that autograd's version counter does not move; see `can_fold`.
            pairs: ``indices`` ``[k]`` and ``values`` ``[k]`` of each delta.
            operation: gets the adapted weight and must not keep it.
        """
        with self._lock_of(weight):
            self._undo()
            positions = union_positions(pairs)
            originals = read_entries(weight, positions)
            adapted = sum_entries(originals, positions, pairs).to(weight.dtype)
            try:
                try:
                    # Noted before the first byte is written.
                    self._open = _Open(weight, positions, originals, adapted)
                    write_entries(weight, positions, adapted)
                    return operation(weight)
                finally:
                    self._put_back()
            finally:
                # Once more, for an interrupt during the first time.
                self._put_back()

    def _put_back(self) -> None:
        if self._open is not None:
            write_entries(self._open.weight, self._open.positions, self._open.originals)
            self._open = None

    def undo_interrupted(self) -> None:
        """Take out what an interrupted operation has left in the weight; does nothing if nothing is left."""
        if self._open is None or self._lock._is_owned():  # owned: an operation of this thread is under way
            return
        with self._lock:
            self._undo()

    def _undo(self) -> None:
        if self._open is None:
            return
        weight, positions, originals, adapted = self._open
        # The weight may have been overwritten since, by loading another model for example: only what the fold has
        # written is replaced.
        bits = (len(positions), weight.element_size())
        held = read_entries(weight, positions)
        ours = (held.view(torch.uint8) == adapted.view(torch.uint8)).view(bits).all(dim=1)
        write_entries(weight, positions[ours], originals[ours])
        self._open = None

    def _lock_of(self, weight: Tensor) -> Any:
        address = weight.untyped_storage().data_ptr()
        if address != self._address:
            with _TABLE_LOCK:
                lock = _LOCKS.get(address)
                if lock is None:
                    lock = _LOCKS[address] = threading.RLock()
            self._lock = lock
            self._address = address
        return self._lock

    def __reduce__(self) -> tuple[type[WeightFold], tuple[()]]:
        # A copy of a layer has a weight of its own.
        return WeightFold, ()

    def __del__(self) -> None:
        self.undo_interrupted()


class ParameterSwap:
    """Runs a module with other tensors in place of some of its parameters.

    `torch.func.functional_call` puts the parameters back, but an interrupt while it does leaves the other tensors in
    the module. So the parameters are noted before the call, and put back by the next use of the module at the latest.
    """

    def __init__(self) -> None:
        self._own: dict[str, Any] | None = None
        self._lock = threading.RLock()

    def run(self, module: nn.Module, tensors: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        """The output of the module with these tensors; another thread that swaps its parameters waits."""
        if self._lock._is_owned():  # the module calls itself: the outer call puts back
            return torch.func.functional_call(module, tensors, args, kwargs)
        with self._lock:
            self._put_back(module)
            try:
                try:
                    own = module._parameters
                    self._own = {name: own[name] for name in tensors if name in own}
                    return torch.func.functional_call(module, tensors, args, kwargs)
                finally:
                    self._put_back(module)
            finally:
                # Once more, for an interrupt during the first time.
                self._put_back(module)

    def undo_interrupted(self, module: nn.Module) -> None:
        """Put back what an interrupted call has left out; does nothing during a call of this thread."""
        if self._own is None or self._lock._is_owned():
            return
        with self._lock:
            self._put_back(module)

    def _put_back(self, module: nn.Module) -> None:
        if self._own is not None:
            module._parameters.update(self._own)
            self._own = None


_SWAPS: weakref.WeakKeyDictionary[nn.Module, ParameterSwap] = weakref.WeakKeyDictionary()


def call_with(module: nn.Module, tensors: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
    """`torch.func.functional_call`, safe against interrupts (see `ParameterSwap`)."""
    if torch.compiler.is_compiling():
        return torch.func.functional_call(module, tensors, args, kwargs)
    swap = _SWAPS.get(module)
    if swap is None:
        swap = _SWAPS.setdefault(module, ParameterSwap())
    return swap.run(module, tensors, args, kwargs)


def undo_swap(find_module: Callable[[], nn.Module]) -> None:
    """Put back the parameters of a module that an interrupted `call_with` has left out.

    Args:
        find_module: returns the module; not called while no module has ever been swapped, as this is asked often.
    """
    if torch.compiler.is_compiling():
        return  # the table would become part of the graph
    if _SWAPS and (swap := _SWAPS.get(module := find_module())) is not None:
        swap.undo_interrupted(module)


def can_fold(parameter: Tensor) -> bool:
    """Whether deltas may be written into a weight.

    On a GPU they are not: a copy into the workspace costs little there, and the base stays untouched. Neither are they
    where other processes or other entries share the memory, or where it is not there.
    """
    return (
        type(parameter) in (Tensor, nn.Parameter)  # a sharded weight is a subclass
        and parameter.device.type == "cpu"
        and not parameter.is_inference()
        and 0 not in parameter.stride()
        and not parameter.untyped_storage().is_shared()
        and not hasattr(parameter, "ds_id")  # DeepSpeed's ZeRO stage 3
    )


class WholeWeights:
    """First base of a module with adapted weights: what an interrupt has left in them is taken out before use.

    Weights are used when the module's state is read or loaded, when it is copied or moved, and when its mode changes.
    """

    def undo_interrupted(self) -> None:
        """Take out what an interrupted operation has left in base weights (see `spiel_peft.weights.folding`)."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> nn.Module:
        self.undo_interrupted()
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.undo_interrupted()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.undo_interrupted()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.undo_interrupted()
        return self.__dict__.copy()

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self.undo_interrupted()
        return super()._apply(fn, recurse)


# How an adapted weight is made for the length of one operation.


T = TypeVar("T")

WEIGHT_CHANGED = (
    "a base weight was changed (merged, unmerged or written to) between a forward pass and its backward pass; finish "
    "the backward pass first"
)


class WeightSource:
    """Reads a base weight now and again in backward, and notices if it changed in between.

    Args:
        read: returns the weight, plain or dequantized; raises if it has been merged in the meantime.
        parameter: the plain parameter behind it, or None for a weight that is quantized or offloaded.
        dtype: dtype to which the adapted weight is rounded.
        fold: writes deltas into the parameter; None for a parameter that must not be written to.
        in_workspace: for a quantized weight: dequantizes it with deltas added into memory that all layers share, for
            the length of a block; gives None where it cannot.
    """

    def __init__(
        self,
        read: Callable[[], Tensor],
        parameter: Tensor | None,
        dtype: torch.dtype,
        fold: WeightFold | None = None,
        in_workspace: Callable[[Pairs, torch.dtype], AbstractContextManager[Tensor | None]] | None = None,
    ) -> None:
        self.read = read
        self.parameter = parameter
        self.dtype = dtype
        self.fold = fold
        self.in_workspace = in_workspace
        self.version = self._current_version()

    def _current_version(self) -> int:
        # Inference tensors have no version, and no backward pass either.
        tracked = self.parameter is not None and not self.parameter.is_inference()
        return self.parameter._version if tracked else 0

    def unchanged(self) -> Tensor:
        """The base weight; raises a RuntimeError if it is not that of the forward pass any more."""
        if self.fold is not None:
            self.fold.undo_interrupted()
        if self._current_version() != self.version:
            raise RuntimeError(WEIGHT_CHANGED)
        return self.read()

    def adapted(self, pairs: Pairs) -> Tensor:
        """The adapted weight as a tensor of its own."""
        return apply_deltas(self.unchanged(), pairs, self.dtype)

    def use(self, pairs: Pairs, compute_dtype: torch.dtype, operation: Callable[[Tensor], T]) -> T:
        """Run an operation on the adapted weight: in place, in shared memory, or else in memory of its own.

        Args:
            pairs: ``indices`` ``[k]`` and ``values`` ``[k]`` of each delta, not tracked by autograd.
            compute_dtype: to which the adapted weight is cast for the operation.
            operation: gets the weight and must not keep it, nor a view of it.
        """
        if self.in_workspace is not None:
            with self.in_workspace(pairs, compute_dtype) as weight:
                if weight is not None:
                    return operation(weight)
        base = self.unchanged()
        if self.fold is not None and compute_dtype == self.dtype and can_fold(self.parameter):
            return self.fold.run(self.parameter.data, pairs, operation)
        if self.in_workspace is None and base.is_contiguous() and not base.is_meta:
            with workspace(base.shape, compute_dtype, base.device) as out:
                return operation(copy_fold(base.detach(), pairs, out))
        # Dequantized already, or laid out in a way that the operation may depend on.
        return operation(apply_deltas(base, pairs, self.dtype).to(compute_dtype))
