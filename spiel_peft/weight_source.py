"""How an adapted weight is made for the length of one operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from spiel_kernels import apply_deltas

from .delta import SparseDelta
from .resident import Pairs, WeightFold, can_fold

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
        fold: writes deltas into the parameter.
        stays: deltas may stay in the parameter after an operation that records a gradient.
        check: raises what `read` raises, without reading; needed with `fold`.
        in_workspace: for a quantized weight: dequantizes it with deltas added into memory that all layers share, for
            the length of a block; gives None where it cannot.
    """

    def __init__(
        self,
        read: Callable[[], Tensor],
        parameter: Tensor | None,
        dtype: torch.dtype,
        fold: WeightFold | None = None,
        stays: bool = False,
        in_workspace: Callable[[Pairs, torch.dtype], AbstractContextManager[Tensor | None]] | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.read = read
        self.parameter = parameter
        self.dtype = dtype
        self.fold = fold
        self.stays = stays
        self.in_workspace = in_workspace
        self.check = check
        self.version = self._current_version()

    def _current_version(self) -> int:
        # Inference tensors have no version, and no backward pass either.
        tracked = self.parameter is not None and not self.parameter.is_inference()
        return self.parameter._version if tracked else 0

    def _check_version(self) -> None:
        if self._current_version() != self.version:
            raise RuntimeError(WEIGHT_CHANGED)

    def _read_unchanged(self) -> Tensor:
        self._check_version()
        return self.read()

    def adapted(self, pairs: Pairs) -> Tensor:
        """The adapted weight as a tensor of its own."""
        if self.fold is not None:
            self.fold.unfold()
        return apply_deltas(self._read_unchanged(), pairs, self.dtype)

    @contextmanager
    def weight(
        self, deltas: Sequence[SparseDelta], pairs: Pairs, compute_dtype: torch.dtype, in_backward: bool = False
    ) -> Iterator[Tensor]:
        """The adapted weight for the length of one operation: in place where that can be done, else a copy.

        The operation must not keep the tensor.
        """
        if self.in_workspace is not None:
            with self.in_workspace(pairs, compute_dtype) as weight:
                if weight is not None:
                    yield weight
                    return
        if self.fold is None or self.check is None or self.parameter is None or not can_fold(self.parameter):
            yield apply_deltas(self._read_unchanged(), pairs, self.dtype).to(compute_dtype)
            return
        self._check_version()
        self.check()
        if self.stays:
            self.fold.fold(self.parameter, deltas, pairs, as_in_forward=in_backward)
            yield self.parameter.data.to(compute_dtype)
        else:
            with self.fold.transient(self.parameter, deltas, pairs) as folded:
                yield folded.to(compute_dtype)
