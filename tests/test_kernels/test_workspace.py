"""The shared buffers: lent to one borrower at a time, handed out again, grown on demand."""

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


def address_for(*shape: int, dtype: torch.dtype = torch.float32) -> int:
    """The address of the buffer that is lent for a shape."""
    with workspace(shape, dtype, "cpu") as out:
        return address(out)


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (0, 4), (4, 0), (7,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_shape_dtype_and_layout(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with workspace(shape, dtype, "cpu") as out:
        assert out.shape == shape and out.dtype == dtype and out.is_contiguous() and not out.requires_grad


def test_smaller_and_equal_requests_share_the_buffer_and_larger_ones_replace_it() -> None:
    first = address_for(8, 16)
    assert address_for(16, 8) == first
    assert address_for(3, 5) == first
    assert workspace_nbytes() == 8 * 16 * 4
    address_for(9, 16)
    assert workspace_nbytes() == 9 * 16 * 4


def test_dtypes_have_buffers_of_their_own() -> None:
    assert address_for(4, 4) != address_for(4, 4, dtype=torch.bfloat16)
    assert workspace_nbytes() == 16 * (4 + 2)


def test_nested_borrowers_never_share() -> None:
    with workspace((4, 4), torch.float32, "cpu") as outer:
        outer.fill_(1)
        with workspace((4, 4), torch.float32, "cpu") as inner:
            inner.fill_(2)
        assert address(inner) != address(outer)
        assert (outer == 1).all()
    # Both buffers are free for the next borrowers.
    with workspace((4, 4), torch.float32, "cpu") as first, workspace((4, 4), torch.float32, "cpu") as second:
        assert {address(first), address(second)} == {address(outer), address(inner)}


def test_a_buffer_goes_back_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="failed"), workspace((4, 4), torch.float32, "cpu") as out:
        raise RuntimeError("failed")
    assert address_for(4, 4) == address(out)


def test_release_forgets_everything_and_leaves_views_alive() -> None:
    with workspace((4, 4), torch.float32, "cpu") as held:
        held.fill_(3)
    release_workspaces()
    assert workspace_nbytes() == 0
    with workspace((4, 4), torch.float32, "cpu") as out:
        out.fill_(5)
    assert (held == 3).all()


def test_bytes_of_one_device() -> None:
    address_for(4, 4)
    assert workspace_nbytes("cpu") == 64
    assert workspace_nbytes("cuda") == 0


def test_threads_never_share_a_buffer() -> None:
    """No thread sees what another one writes, however the threads take turns."""
    wrong: list[int] = []

    def work(number: int) -> None:
        for size in [7, 30, 11, 64] * 100:
            with workspace((size, size), torch.float32, "cpu") as out:
                out.fill_(number)
                out.mul_(2)
                if not (out == 2 * number).all():
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    # No more buffers than there were threads, none larger than the largest request.
    assert workspace_nbytes() <= 4 * 64 * 64 * 4


def test_threads_with_a_buffer_at_the_same_time() -> None:
    taken, looked, done = [], threading.Event(), threading.Event()

    def work() -> None:
        with workspace((4, 4), torch.float32, "cpu") as out:
            taken.append(address(out))
            looked.set()
            done.wait(10)

    with workspace((4, 4), torch.float32, "cpu") as mine:
        thread = threading.Thread(target=work)
        thread.start()
        assert looked.wait(10)
        assert taken != [address(mine)]
        done.set()
        thread.join()
    assert workspace_nbytes() == 2 * 64


def test_buffer_made_in_inference_mode_can_be_written_outside_it() -> None:
    with torch.inference_mode(), workspace((4, 4), torch.float32, "cpu") as out:
        out.fill_(1)
    with workspace((4, 4), torch.float32, "cpu") as again:
        again.fill_(2)
    assert address(again) == address(out)


def test_fake_tensors_are_not_kept() -> None:
    with FakeTensorMode(), workspace((4, 4), torch.float32, "cpu") as out:
        assert out.shape == (4, 4)
    assert workspace_nbytes() == 0
    with workspace((4, 4), torch.float32, "cpu") as out:
        assert type(out) is Tensor


def test_negative_sizes_are_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"sizes must not be negative, got \(-1, 4\)"),
        workspace((-1, 4), torch.float32, "cpu"),
    ):
        pass
