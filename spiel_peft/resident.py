"""Deltas that live in a base weight for a while, so that forward and backward cost what a plain layer costs.

"Folded" means: from the first forward pass with gradients after an optimizer step until the next step's hook, which
unfolds before any other code runs. Before the first step of a run and after its last one nothing stays in the weight.
Whoever looks at a base weight in between through PEFT, a state dict, a copy or a move gets the original: those unfold
first. A plain read of the parameter sees the deltas.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spiel_kernels import fold_, folded, read_entries, refold_, sum_entries, unfold_, union_positions, write_entries

if TYPE_CHECKING:
    from .delta import SparseDelta

Pairs = Sequence[tuple[Tensor, Tensor]]

# Weights that hold deltas right now.
_FOLDED: weakref.WeakSet[WeightFold] = weakref.WeakSet()
# A backward pass may run in another thread than the forward pass.
_LOCK = threading.RLock()


class WeightFold:
    """Writes the deltas of a layer into its plain base weight and takes them out again, bit for bit.

    Costs the originals of the touched entries, in the weight's dtype, while folded.
    """

    def __init__(self) -> None:
        self.deltas: tuple[SparseDelta, ...] = ()
        self._parameter: Tensor | None = None
        self._originals: Tensor | None = None
        self._positions: Tensor | None = None  # one delta: its own indices
        self._versions = (0, 0)

    @property
    def active(self) -> bool:
        return self._originals is not None

    def __reduce__(self) -> tuple[type[WeightFold], tuple[()]]:
        # Copies and pickles of a layer hold the original weight.
        self.unfold()
        return WeightFold, ()

    def fold(self, parameter: Tensor, deltas: Sequence[SparseDelta], pairs: Pairs, as_in_forward: bool = False) -> None:
        """Have exactly these deltas in the weight, until somebody unfolds them.

        Args:
            parameter: the base weight; its ``.data`` is written to, so autograd's version counter does not move.
            deltas: owners of the pairs.
            pairs: ``indices`` ``[k]`` and ``values`` ``[k]`` of each.
            as_in_forward: the values are those that the forward pass folded, so what is still there need not be
                written again.
        """
        with _LOCK:
            if self.active and not self._holds(parameter, deltas):
                self.unfold()
            weight = parameter.data
            if not self.active:
                self._positions = pairs[0][0] if len(pairs) == 1 else union_positions(pairs)
                if len(pairs) == 1:
                    self._originals = fold_(weight, *pairs[0])
                else:
                    self._originals = read_entries(weight, self._positions)
                    self._rewrite(weight, pairs)
                self._parameter, self.deltas = parameter, tuple(deltas)
                self._versions = (parameter._version, self._positions._version)
                _FOLDED.add(self)
            elif not as_in_forward:
                # Values may have changed through `.data`, which leaves no trace; writing is cheaper than comparing.
                self._rewrite(weight, pairs)

    def _holds(self, parameter: Tensor, deltas: Sequence[SparseDelta]) -> bool:
        same = len(deltas) == len(self.deltas) and all(a is b for a, b in zip(deltas, self.deltas, strict=True))
        # An assignment to a parameter's `.data`, or a write to it, is sorted out by unfolding.
        return same and parameter is self._parameter and parameter._version == self._versions[0]

    def _rewrite(self, weight: Tensor, pairs: Pairs) -> None:
        originals, positions = self._originals, self._positions
        if len(pairs) == 1:
            refold_(weight, positions, pairs[0][1], originals)
        else:
            write_entries(weight, positions, sum_entries(originals, positions, pairs).to(weight.dtype))

    def unfold(self) -> None:
        """Give the weight its original bits back; does nothing if it has them."""
        with _LOCK:
            if not self.active:
                return
            parameter, positions, originals = self._parameter, self._positions, self._originals
            moved = positions._version != self._versions[1]
            overwritten = parameter._version != self._versions[0]
            deltas = self.deltas
            self._parameter = self._positions = self._originals = None
            self.deltas = ()
            _FOLDED.discard(self)
            if moved:
                raise RuntimeError(
                    f"{deltas[0].module_name}: the indices of a delta were changed while it was folded into the base "
                    "weight (between a forward pass and the optimizer step); the base weight cannot be restored, load "
                    "it again"
                )
            weight = parameter.data
            if overwritten:
                # Somebody has written to the weight meanwhile: keep what is theirs, take out what is ours.
                pairs = [(delta.indices, delta.values.detach()) for delta in deltas]
                places = positions.to(weight.device, torch.int64)
                ours = sum_entries(originals, places, pairs).to(weight.dtype) == read_entries(weight, places)
                write_entries(weight, places[ours], originals.to(weight.device, weight.dtype)[ours])
            else:
                # To where the data is now, in case it was moved without telling.
                unfold_(weight, positions.to(weight.device), originals.to(weight.device, weight.dtype))

    @contextmanager
    def transient(self, parameter: Tensor, deltas: Sequence[SparseDelta], pairs: Pairs) -> Iterator[Tensor]:
        """The adapted weight for the length of one operation, in place; the weight is left as it was found.

        Another thread that adapts a weight waits; one that reads the base weight meanwhile would see the deltas in it.
        """
        with _LOCK:
            if self.active and self._holds(parameter, deltas):
                self._rewrite(parameter.data, pairs)
                yield parameter.data
                return
            self.unfold()
            with folded(parameter.data, pairs):
                yield parameter.data


def unfold_deltas(deltas: Iterable[SparseDelta]) -> None:
    """Take these deltas out of every base weight that holds one of them."""
    wanted = {id(delta) for delta in deltas}
    for fold in list(_FOLDED):
        if any(id(delta) in wanted for delta in fold.deltas):
            fold.unfold()


def can_stay_folded(parameter: Tensor) -> bool:
    """Whether deltas may live in this weight: one that nobody else reads, trains or holds a part of."""
    return (
        can_fold(parameter)
        and not parameter.requires_grad
        # The memory of another process.
        and not (parameter.device.type == "cpu" and parameter.untyped_storage().is_shared())
    )


def can_fold(parameter: Tensor) -> bool:
    """Whether a weight can be written to in place: sharded ones are a subclass, expanded ones share entries."""
    plain = type(parameter) in (Tensor, torch.nn.Parameter) and not parameter.is_inference()
    return plain and not parameter.is_meta and 0 not in parameter.stride() and not hasattr(parameter, "ds_id")
