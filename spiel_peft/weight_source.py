"""How an adapted weight is made for the length of one operation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor

from spiel_kernels import apply_deltas, copy_fold
from spiel_kernels.workspace import workspace

from .folding import Pairs, WeightFold, can_fold

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
