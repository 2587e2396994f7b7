"""Comparisons of tensors, a record of tensor operations, and the texts of warnings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value (0 for empty tensors)."""
    if expected.numel() == 0:
        assert got.shape == expected.shape
        return 0.0
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).abs().max()) / (float(expected.abs().max()) or 1.0)


def assert_close(got: Tensor, expected: Tensor, tolerance: float, name: str = "tensor") -> None:
    """Compare shapes, and `relative_error` with a tolerance."""
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    error = relative_error(got, expected)
    assert error <= tolerance, f"{name}: relative error {error:.3g}, allowed {tolerance:.3g}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit; NaNs too."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def assert_same_bits(got: Tensor, expected: Tensor, name: str = "tensor") -> None:
    """Like `same_bits`, with a message that counts the entries that differ."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, name
    assert same_bits(got, expected), f"{name}: {int((got != expected).sum())} of {got.numel()} entries differ"


@dataclass
class Op:
    """One tensor operation: its name, the sizes of the tensors it allocated, and the storages it read."""

    name: str
    out_numels: list[int]
    storages: set[int]


class Failing(TorchDispatchMode):
    """Raises instead of running operation number `at` (from 0); with `on`, instead of all later ones too."""

    def __init__(self, at: int, on: bool = False, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.at, self.on, self.error = at, on, error
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number, self.count = self.count, self.count + 1
        if number == self.at or (self.on and number > self.at):
            raise self.error(f"operation {number} fails")
        return func(*args, **(kwargs or {}))


class OpRecorder(TorchDispatchMode):
    """Records every tensor operation, also in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in tensors}
        new = [t.numel() for t in made if t.untyped_storage().data_ptr() not in storages]
        self.ops.append(Op(func.overloadpacket.__name__, new, storages))
        return out

    @property
    def largest(self) -> int:
        """Elements of the largest tensor that any operation allocated."""
        return max((n for op in self.ops for n in op.out_numels), default=0)

    def reads(self, tensor: Tensor) -> bool:
        """Whether any operation read the tensor's memory."""
        return any(tensor.untyped_storage().data_ptr() in op.storages for op in self.ops)

    @property
    def matmuls(self) -> list[Op]:
        """Matrix products and convolutions."""
        names = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
        return [op for op in self.ops if op.name in names]


def texts(record: Iterable[Any]) -> str:
    """All warnings of a `pytest.warns` block or `catch_warnings` list in one string."""
    return "\n".join(str(warning.message) for warning in record)
