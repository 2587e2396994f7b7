"""The transient fold: deltas are written into a plain base weight for the length of one operation, then taken out.

Nothing that runs after the operation sees deltas in a base weight: not another model on the same storage, not a copy, not
the handler of an exception. Before the first byte is written the layer holds the originals, and it forgets them last. So
whatever ends an operation, even an interrupt between two instructions, the originals are put back: at once, or, after two
interrupts in a row, at the next use of the layer (`WeightFold.undo_interrupted`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from spiel_kernels import read_entries, sum_entries, union_positions, write_entries

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
        """Take out what an interrupted operation has left in base weights (see `spiel_peft.folding`)."""
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
