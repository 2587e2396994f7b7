"""Makes the adapted weight of a layer for the length of one operation.

A plain weight on a CPU gets the transient fold: deltas are written into the base weight for the operation and taken out
after it. Other weights are copied, most of them into memory that all layers share (`WeightSource.use`).

Nothing that runs after the operation sees deltas in a base weight: not another model on the same storage, not a copy,
not the handler of an exception. The layer holds the original entries before the first byte is written, and forgets them
last. So the originals are put back whatever ends an operation, even an interrupt between two instructions: at once, or,
after two interrupts in a row, at the next use of the layer (`WeightFold.undo_interrupted`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from spiel_kernels import apply_deltas, copy_fold, read_entries, sum_entries, union_positions, write_entries
from spiel_kernels.dispatch import on_host
from spiel_kernels.workspace import workspace

from .base_weight import repeats_memory

Pairs = Sequence[tuple[Tensor, Tensor]]
T = TypeVar("T")

# One lock for each storage that is written to, kept alive by the folds that use it: two threads may run models that
# share a weight.
_LOCKS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_TABLE_LOCK = threading.Lock()


class _Open(NamedTuple):
    """A fold that has begun and not been undone."""

    weight: Tensor
    positions: Tensor  # int64 [u]
    originals: Tensor  # [u] in the weight's dtype
    adapted: Tensor  # [u] in the weight's dtype: the entries written


class WeightFold:
    """Writes deltas into a plain weight for the length of one operation. Each layer has its own."""

    def __init__(self) -> None:
        self._open: _Open | None = None
        self._lock: Any = None
        self._address: int | None = None

    def run(self, weight: Tensor, pairs: Pairs, operation: Callable[[Tensor], T]) -> T:
        """Run an operation on a weight with deltas in it.

        Another thread that runs an operation on a weight of the same storage waits.

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
                    # The originals are noted before the first byte is written.
                    self._open = _Open(weight, positions, originals, adapted)
                    write_entries(weight, positions, adapted)
                    return operation(weight)
                finally:
                    self._put_back()
            finally:
                # Again, in case an interrupt has ended the first call.
                self._put_back()

    def _put_back(self) -> None:
        if self._open is not None:
            write_entries(self._open.weight, self._open.positions, self._open.originals)
            self._open = None

    def undo_interrupted(self) -> None:
        """Take out deltas that an interrupted operation has left in the weight; usually there are none."""
        if self._open is None or self._lock._is_owned():  # owned: an operation of this thread is running
            return
        with self._lock:
            self._undo()

    def _undo(self) -> None:
        if self._open is None:
            return
        weight, positions, originals, adapted = self._open
        # The weight may have been overwritten since, by loading another model for example. Only entries that still hold
        # what the fold wrote are replaced.
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

    def __del__(self) -> None:
        self.undo_interrupted()


class ParameterSwap:
    """Runs a module with other tensors in place of some of its parameters.

    `torch.func.functional_call` puts the parameters back, but an interrupt at that moment leaves the other tensors in
    the module. So the parameters are noted before the call, and put back at the next use of the module at the latest.
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
                # Again, in case an interrupt has ended the first call.
                self._put_back(module)

    def undo_interrupted(self, module: nn.Module) -> None:
        """Put back the parameters that an interrupted call has replaced; does nothing during a call of this thread."""
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
    """Put back the parameters of a module that an interrupted `call_with` has replaced.

    Args:
        find_module: returns the module. It is not called while no module has been swapped: this function runs often.
    """
    if torch.compiler.is_compiling():
        return  # the table would become part of the graph
    if _SWAPS and (swap := _SWAPS.get(module := find_module())) is not None:
        swap.undo_interrupted(module)


def can_fold(parameter: Tensor) -> bool:
    """Whether deltas may be written into a weight.

    Not on a GPU: a copy into the workspace costs little there, and the base stays untouched. Not where other processes
    or other entries of the weight share the memory, and not where the weight is not in memory.
    """
    return (
        type(parameter) in (Tensor, nn.Parameter)  # a sharded weight is a subclass
        and on_host(parameter)
        and not parameter.is_inference()
        and not repeats_memory(parameter)
        and not parameter.untyped_storage().is_shared()
        and not hasattr(parameter, "ds_id")  # DeepSpeed's ZeRO stage 3
    )


class WholeWeights:
    """First base class of modules with adapted weights: restores the weights after an interrupt, before any use.

    A use is reading or loading the module's state, copying or moving the module, and changing its mode.
    """

    def undo_interrupted(self) -> None:
        """Take out deltas that an interrupted operation has left in base weights; usually there are none."""
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


WEIGHT_CHANGED = (
    "a base weight was changed (merged, unmerged or written to) between a forward pass and its backward pass; finish "
    "the backward pass first"
)


class SourceOwner(Protocol):
    """What a `WeightSource` asks of the layer that owns it."""

    def plain_parameter(self) -> Tensor | None:
        """The parameter that holds the weight; None for a weight that is quantized or offloaded."""

    def rounding_dtype(self, compute_dtype: torch.dtype | None) -> torch.dtype:
        """The dtype to which an adapted weight is rounded if operations run in `compute_dtype`."""

    def keeps_parameter(self) -> bool:
        """Whether the parameter stays in memory after an operation, so that deltas may be written into it."""

    def read_weight(self) -> Tensor:
        """The weight, plain or dequantized; raises a RuntimeError if deltas are merged into it."""

    def adapted_in_workspace(self, pairs: Pairs, compute_dtype: torch.dtype) -> AbstractContextManager[Tensor | None]:
        """Lend a dequantized weight with deltas added, in memory that all layers share; None where that cannot be."""


class WeightState(NamedTuple):
    """A base weight as a forward pass finds it. The backward pass needs it in the same state.

    Attributes:
        owner: the layer, which so lives as long as the pass.
        parameter: that holds the weight; None for a weight that is quantized or offloaded.
        dtype: to which the adapted weight is rounded.
        version: of the parameter; writing to a tensor raises its version.
    """

    owner: SourceOwner
    parameter: Tensor | None
    dtype: torch.dtype
    version: int


def _version(parameter: Tensor | None) -> int:
    # Inference tensors have no version, and no backward pass either.
    return parameter._version if parameter is not None and not parameter.is_inference() else 0


class WeightSource:
    """Makes the adapted weight of one layer for the length of an operation. Each layer, copies too, owns one.

    A pass notes the `state` of the weight when it begins and hands it in with each request.

    Args:
        owner: the layer. It is referenced weakly, so that a layer is freed as soon as nothing else uses it.
        quantized: whether its weight is.
    """

    def __init__(self, owner: SourceOwner, quantized: bool) -> None:
        self._owner = weakref.ref(owner)
        self._quantized = quantized
        self._fold = WeightFold()

    def state(self, compute_dtype: torch.dtype | None = None) -> WeightState:
        """The state of the weight now, for a pass that computes in `compute_dtype` (the weight's own if None)."""
        owner = self._owner()
        assert owner is not None  # the caller has reached this source through the layer
        parameter = owner.plain_parameter()
        return WeightState(owner, parameter, owner.rounding_dtype(compute_dtype), _version(parameter))

    def undo_interrupted(self) -> None:
        """Take out deltas that an interrupted operation has left in the weight; usually there are none."""
        self._fold.undo_interrupted()

    def unchanged(self, state: WeightState) -> Tensor:
        """The base weight; raises a RuntimeError if it was merged or written to since the state was noted."""
        self._fold.undo_interrupted()
        if _version(state.parameter) != state.version:
            raise RuntimeError(WEIGHT_CHANGED)
        return state.owner.read_weight()

    def adapted(self, state: WeightState, pairs: Pairs) -> Tensor:
        """The adapted weight as a tensor of its own."""
        return apply_deltas(self.unchanged(state), pairs, state.dtype)

    def use(self, state: WeightState, pairs: Pairs, compute_dtype: torch.dtype, operation: Callable[[Tensor], T]) -> T:
        """Run an operation on the adapted weight, which is made in place, in shared memory, or in memory of its own.

        Args:
            state: of the weight when the pass began.
            pairs: ``indices`` ``[k]`` and ``values`` ``[k]`` of each delta, not tracked by autograd.
            compute_dtype: to which the adapted weight is cast for the operation.
            operation: gets the weight and must not keep it, nor a view of it.

        Raises:
            RuntimeError: the weight was merged or written to since the state was noted.
        """
        if self._quantized:
            with state.owner.adapted_in_workspace(pairs, compute_dtype) as weight:
                if weight is not None:
                    return operation(weight)
        base, parameter = self.unchanged(state), state.parameter
        in_place = parameter is not None and compute_dtype == state.dtype and can_fold(parameter)
        if in_place and state.owner.keeps_parameter():
            return self._fold.run(parameter.data, pairs, operation)
        if not self._quantized and base.is_contiguous() and not base.is_meta:
            with workspace(base.shape, compute_dtype, base.device) as out:
                return operation(copy_fold(base.detach(), pairs, out))
        # Dequantized already, or laid out in a way that the operation may depend on.
        return operation(apply_deltas(base, pairs, state.dtype).to(compute_dtype))
