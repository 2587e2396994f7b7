"""Tensors on disk, read and written in pieces, so that memory does not grow with their size."""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# Called in long work with the amount done, the whole amount, and the name of the item at hand.
Progress = Callable[[int, int, str], None]
# Bytes of a piece in which tensors are read, changed and written.
PIECE_BYTES = 16 << 20
# Tied weights are stored once and read several times; no model ties more than this, on average over all its weights.
_COPIES = 16

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class StoredTensor:
    """A tensor that can be read piece by piece.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor; None for a dtype that this package cannot compute with.
        where: what messages call the file, or the object in memory, that holds the tensor.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype | None, where: str) -> None:
        self.shape = shape
        self.dtype = dtype
        self.where = where

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The entries ``[start, stop)`` of the flattened tensor, on the CPU, in its dtype: ``[stop - start]``."""
        raise NotImplementedError

    def repeats(self, tensor: Tensor) -> bool:
        """Whether a tensor has this shape and, rounded to this dtype, these entries."""
        if self.dtype is None or tuple(tensor.shape) != self.shape:
            return False
        flat = tensor.flatten()
        return all(torch.equal(flat[a:b].to(self.dtype), self.read(a, b)) for a, b in self.pieces())

    def pieces(self, entries: int | None = None) -> Iterator[tuple[int, int]]:
        """Ranges of entries, in order, that make up the whole tensor, each about `PIECE_BYTES` large."""
        size = entries or max(1, PIECE_BYTES // (self.dtype.itemsize if self.dtype else 1))
        for start in range(0, self.numel, size):
            yield start, min(start + size, self.numel)


class MemoryTensor(StoredTensor):
    """A tensor of a state dict or a module, or one that `torch.load` has mapped into memory."""

    def __init__(self, tensor: Tensor, where: str) -> None:
        super().__init__(tuple(tensor.shape), tensor.dtype, where)
        self.tensor = tensor.detach()

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self.numel if stop is None else stop
        if self.tensor.is_contiguous():
            return self.tensor.view(-1)[start:stop].cpu()
        return self.tensor.take(torch.arange(start, stop, device=self.tensor.device)).cpu()


class FileTensor(StoredTensor):
    """A tensor in a safetensors file, read with plain file reads: mapped pages would count as this process's memory."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype_name: str, begin: int, end: int) -> None:
        super().__init__(shape, _DTYPES.get(dtype_name), str(path))
        self.path = path
        self.dtype_name = dtype_name
        self.begin, self.end = begin, end

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.dtype_name, self.shape, self.end - self.begin)

    def read_bytes(self, start: int, stop: int) -> bytearray:
        """The bytes ``[start, stop)`` of the tensor."""
        buffer = bytearray(stop - start)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.begin + start)
            view = memoryview(buffer)
            while view:
                count = file.readinto(view)
                if not count:
                    raise ValueError(f"{self.path} is truncated")
                view = view[count:]
        return buffer

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        if self.dtype is None:
            raise ValueError(f"{self.where}: tensors of dtype {self.dtype_name} cannot be read")
        stop = self.numel if stop is None else stop
        if start == stop:
            return torch.empty(0, dtype=self.dtype)
        size = self.dtype.itemsize
        return torch.frombuffer(self.read_bytes(start * size, stop * size), dtype=self.dtype)


def read_safetensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file, by name; only the header is read.

    Raises:
        FileNotFoundError: there is no such file; the message names it.
        ValueError: the file is damaged or cut off; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt"):
            pass  # checks the header, and that the file has the length it states
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise ValueError(f"{path} cannot be read, it is damaged or incomplete: {error}") from error
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = FileTensor(path, tuple(entry["shape"]), entry["dtype"], begin, end)
    return tensors


def read_pickled(path: Path) -> dict[str, MemoryTensor]:
    """The tensors of a ``.bin`` file of `torch.save`, mapped into memory; no code in the file is run.

    Raises:
        ValueError: the file is damaged, or holds other objects than tensors; the message names it.
    """
    return {name: MemoryTensor(tensor, str(path)) for name, tensor in load_pickled(path, mmap=True).items()}


def load_pickled(path: Path, mmap: bool) -> dict[str, Tensor]:
    """The tensors of a ``.bin`` file of `torch.save`, on the CPU; no code in the file is run.

    Args:
        path: the file.
        mmap: map the tensors into memory; files of PyTorch before 1.6 cannot be.

    Raises:
        ValueError: as `read_pickled`; or it would take far more memory than it has bytes: it is packed, or its tensors
            share memory or have stride 0.
    """
    size = path.stat().st_size
    try:
        _refuse_unpacking(path, size)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"{path} cannot be read as plain tensors: {(str(error).splitlines() or [type(error).__name__])[0]} Save "
            "the model as safetensors."
        ) from error
    named = isinstance(tensors, Mapping) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} is not a dict of tensors. Save the model as safetensors.")
    for name, tensor in tensors.items():
        problem = None
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            problem = "is not a plain dense tensor"
        elif tensor.numel() * tensor.element_size() > size:
            problem = f"has {tensor.numel()} entries, more than the file of {size} bytes can hold"
        if problem is not None:
            raise ValueError(f"{path}: tensor {name!r} {problem}. Save the model as safetensors.")
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if held > _COPIES * size:
        raise ValueError(
            f"{path}: its tensors have {held} bytes together, far more than the file of {size} bytes: they share "
            "memory. Save the model as safetensors."
        )
    return dict(tensors)


def _refuse_unpacking(path: Path, size: int) -> None:
    """Raise a ValueError if reading a file of torch.save, which are zip archives, takes more memory than its bytes."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is a packed archive, which torch.save does not write.")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its parts are larger than the file.")
        for entry in entries:
            # The only function that PyTorch lets a file call which makes an object of any size.
            if entry.filename.endswith("data.pkl") and b"bytearray" in archive.read(entry):
                raise ValueError("it makes other objects than tensors.")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor in the header of a safetensors file: its dtype by the format's name, its shape, its size in bytes."""

    dtype_name: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorSpec:
        return cls(_NAMES[dtype], tuple(shape), math.prod(shape) * dtype.itemsize)

    @property
    def width(self) -> int:
        """Bytes per entry, rounded up."""
        return -(-self.nbytes // max(1, math.prod(self.shape)))


class SafetensorsWriter:
    """Writes a safetensors file whose tensors come in pieces and in any order.

    Args:
        path: the file to make.
        specs: the tensors that the file will hold, by name.

    Leaving the block without an error flushes the file to disk and checks that every tensor was written in full.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path = path
        self._begin: dict[str, int] = {}
        self._left = {name: spec.nbytes for name, spec in specs.items()}
        self._widths = {name: spec.width for name, spec in specs.items()}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # Wide dtypes first: readers view the bytes as that dtype, which takes an aligned start.
        for name in sorted(specs, key=lambda name: (-specs[name].width, name)):
            spec = specs[name]
            end = offset + spec.nbytes
            header[name] = {"dtype": spec.dtype_name, "shape": list(spec.shape), "data_offsets": [offset, end]}
            self._begin[name] = offset
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._start = 8 + len(encoded)
        self.nbytes = offset
        self._file = open(path, "wb")  # noqa: SIM115
        try:
            self._file.write(struct.pack("<Q", len(encoded)) + encoded)
            self._file.truncate(self._start + offset)
        except BaseException:
            self._file.close()
            raise

    def write(self, name: str, start: int, entries: Tensor) -> None:
        """Write entries ``[n]`` from the flat position `start` on; they must have the dtype of the spec."""
        if entries.numel():
            data = memoryview(entries.contiguous().view(torch.uint8).numpy())
            self.write_bytes(name, start * self._widths[name], data)

    def write_bytes(self, name: str, start: int, data: memoryview | bytearray) -> None:
        """Write bytes of a tensor from the byte `start` on."""
        with self._named(f"tensor {name!r}"):
            self._file.seek(self._start + self._begin[name] + start)
            self._file.write(data)
        self._left[name] -= len(data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                unwritten = [name for name, left in self._left.items() if left]
                if unwritten:
                    raise RuntimeError(f"{self.path}: {unwritten[:3]} not written in full")
                with self._named("the last tensors"):
                    self._file.flush()
                    os.fsync(self._file.fileno())
        finally:
            # Closing flushes again, which fails again on a full disk.
            with suppress(OSError):
                self._file.close()

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Add the file and the tensor to an error of the disk."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} while writing {what}", str(self.path)) from error
