"""Tensor files written in pieces are safetensors files; errors name damaged files."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spiel_peft.files.tensors import SafetensorsWriter, TensorSpec, read_pickled, read_safetensors

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def test_what_is_written_in_pieces_and_any_order_loads_with_safetensors(tmp_path: Path) -> None:
    tensors = {f"t{i}": (torch.randn(3, 5) * 9).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "odd": torch.arange(7, dtype=torch.uint8)}
    specs = {name: TensorSpec.of(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path / "a", specs) as writer:
        for name in reversed(tensors):
            flat = tensors[name].flatten()
            for start in reversed(range(0, flat.numel(), 4)):
                writer.write(name, start, flat[start : start + 4])
    loaded = load_file(tmp_path / "a")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def test_pieces_read_are_the_tensor(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(7, 3).bfloat16(), "b": torch.arange(5), "c": torch.tensor(3.0), "d": torch.empty(0)}
    save_file(tensors, tmp_path / "f")
    for name, stored in read_safetensors(tmp_path / "f").items():
        assert stored.shape == tuple(tensors[name].shape) and stored.dtype == tensors[name].dtype
        assert torch.equal(stored.read(), tensors[name].flatten())
        read = [stored.read(*limits) for limits in stored.pieces(2)]
        assert torch.equal(torch.cat([torch.empty(0, dtype=stored.dtype), *read]), tensors[name].flatten())


def test_a_tensor_that_was_not_written_is_an_error(tmp_path: Path) -> None:
    spec = TensorSpec.of(torch.float32, (4,))
    with pytest.raises(RuntimeError, match=r"\['b'\] not written"):
        with SafetensorsWriter(tmp_path / "f", {"a": spec, "b": spec}) as writer:
            writer.write("a", 0, torch.zeros(4))
            writer.write("b", 0, torch.zeros(3))


def test_a_full_disk_names_file_and_tensor(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device while writing tensor 'a'.*f'") as caught:
        with SafetensorsWriter(tmp_path / "f", {"a": TensorSpec.of(torch.float32, (4,))}) as writer:

            class Full:
                def seek(self, position: int) -> None: ...

                def write(self, data: bytes) -> None:
                    raise OSError(errno.ENOSPC, "No space left on device")

                close = writer._file.close

            writer._file = Full()
            writer.write("a", 0, torch.zeros(4))
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("keep", [0, 5, 60, -3])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    save_file({"a": torch.randn(50)}, tmp_path / "f")
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:keep])
    with pytest.raises(ValueError, match="f cannot be read, it is damaged or incomplete"):
        read_safetensors(tmp_path / "f")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("1/0",))


def test_pickles_are_read_as_plain_tensors_or_not_at_all(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3.0)}, tmp_path / "good.bin")
    assert torch.equal(read_pickled(tmp_path / "good.bin")["a"].read(), torch.arange(3.0))
    torch.save({"a": Evil()}, tmp_path / "evil.bin")
    torch.save([1, 2], tmp_path / "list.bin")
    for name in ("evil.bin", "list.bin"):
        with pytest.raises(ValueError, match=rf"{name} .*Save the model as safetensors"):
            read_pickled(tmp_path / name)
