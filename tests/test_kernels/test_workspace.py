"""The shared buffer: grows, is handed out again, belongs to one thread on a CPU, survives inference mode."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from spiel_kernels.workspace import release_workspaces, workspace, workspace_nbytes


@pytest.fixture(autouse=True)
def empty_workspaces() -> Iterator[None]:
    release_workspaces()
    yield
    release_workspaces()


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_shape_dtype_and_layout(shape: tuple[int, int], dtype: torch.dtype) -> None:
    out = workspace(*shape, dtype, "cpu")
    assert out.shape == shape and out.dtype == dtype and out.is_contiguous() and not out.requires_grad


def test_smaller_and_equal_requests_share_the_buffer_and_larger_ones_replace_it() -> None:
    first = workspace(8, 16, torch.float32, "cpu")
    assert address(workspace(16, 8, torch.float32, "cpu")) == address(first)
    assert address(workspace(3, 5, torch.float32, "cpu")) == address(first)
    assert workspace_nbytes() == 8 * 16 * 4
    workspace(9, 16, torch.float32, "cpu")
    assert workspace_nbytes() == 9 * 16 * 4


def test_dtypes_have_buffers_of_their_own() -> None:
    full, half = workspace(4, 4, torch.float32, "cpu"), workspace(4, 4, torch.bfloat16, "cpu")
    assert address(full) != address(half)
    assert workspace_nbytes() == 16 * (4 + 2)


def test_release_forgets_everything_and_leaves_views_alive() -> None:
    held = workspace(4, 4, torch.float32, "cpu").fill_(3)
    release_workspaces()
    assert workspace_nbytes() == 0
    workspace(4, 4, torch.float32, "cpu").fill_(5)
    assert (held == 3).all()


def test_bytes_of_one_device() -> None:
    workspace(4, 4, torch.float32, "cpu")
    assert workspace_nbytes("cpu") == 64
    assert workspace_nbytes("cuda") == 0


def test_threads_on_a_cpu_never_share_and_release_reaches_them_all() -> None:
    mine, seen, bytes_held = workspace(4, 4, torch.float32, "cpu"), [], []
    looked, released = threading.Event(), threading.Event()

    def work() -> None:
        seen.append(address(workspace(4, 4, torch.float32, "cpu")))
        looked.set()
        released.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    assert looked.wait(10)
    bytes_held.append(workspace_nbytes())
    release_workspaces()
    bytes_held.append(workspace_nbytes())
    released.set()
    thread.join()
    assert seen != [address(mine)] and bytes_held == [128, 0]


def test_buffers_of_a_thread_go_with_it() -> None:
    thread = threading.Thread(target=lambda: workspace(64, 64, torch.float32, "cpu"))
    thread.start()
    thread.join()
    assert workspace_nbytes() == 0


def test_buffer_made_in_inference_mode_can_be_written_outside_it() -> None:
    with torch.inference_mode():
        workspace(4, 4, torch.float32, "cpu").fill_(1)
    workspace(4, 4, torch.float32, "cpu").fill_(2)


def test_fake_tensors_are_not_kept() -> None:
    with FakeTensorMode():
        assert workspace(4, 4, torch.float32, "cpu").shape == (4, 4)
    assert workspace_nbytes() == 0
    assert type(workspace(4, 4, torch.float32, "cpu")) is Tensor


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="rows and cols must not be negative, got -1 and 4"):
        workspace(-1, 4, torch.float32, "cpu")
