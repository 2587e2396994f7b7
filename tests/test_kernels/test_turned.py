"""Activations kept column by column, and the sampled gather that reads them."""

from __future__ import annotations

import threading

import pytest
import torch
from peft import get_peft_model
from support.layers import adapt, values_of
from support.tensors import assert_same_bits
from torch import Tensor, nn

from spiel_kernels import gather_outer
from spiel_kernels.sampled import _last, is_turned, turned
from spiel_peft import SpIELConfig

from .oracle import DTYPE_IDS, DTYPES, draw_indices


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (5,), (0, 5), (1, 1), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_turned_copy_holds_the_same_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    copy = turned(x)
    assert is_turned(copy)
    assert torch.equal(copy, x.reshape(-1, shape[-1]))
    assert copy.dtype == dtype and not copy.requires_grad


def test_layers_that_share_an_input_share_the_copy_until_it_changes() -> None:
    x = torch.randn(4, 3)
    first, before = turned(x), x.clone()
    assert turned(x) is first
    x += 1
    second = turned(x)
    assert second is not first and torch.equal(second, x) and torch.equal(first, before)
    other = x.clone()
    assert torch.equal(turned(other), other)
    assert turned(x) is not second, "only the last one is remembered"


def test_nothing_is_kept_once_the_input_is_gone() -> None:
    x = torch.randn(4, 3)
    turned(x)
    assert _last.slot.kept is not None
    del x
    assert _last.slot.kept is None


def test_threads_do_not_see_each_others_copies() -> None:
    x = torch.randn(4, 3)
    mine, theirs = turned(x), []
    thread = threading.Thread(target=lambda: theirs.append(turned(x)))
    thread.start()
    thread.join()
    assert theirs[0] is not mine and torch.equal(theirs[0], mine)
    assert turned(x) is mine


def test_inference_tensors_are_copied_anew() -> None:
    with torch.inference_mode():
        x = torch.randn(4, 3)
        assert torch.equal(turned(x), x)


@pytest.mark.parametrize("dtype, tolerance", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 256, 512, 513, 1100])
@pytest.mark.parametrize("sides", ["a", "b", "ab"])
def test_the_sampled_gather_takes_turned_operands(
    sides: str, tokens: int, dtype: torch.dtype, tolerance: float
) -> None:
    a, b = torch.randn(tokens, 13).to(dtype), torch.randn(tokens, 9).to(dtype)
    indices = draw_indices(13 * 9, 40, torch.int32)
    exact = (a.double().T @ b.double()).flatten()[indices.long()]
    given = [turned(x) if name in sides else x for name, x in (("a", a), ("b", b))]
    if tokens > 1:
        assert [is_turned(x) for x in given] == ["a" in sides, "b" in sides]
    got = gather_outer(*given, indices, method="sampled")
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance * max(1, tokens) ** 0.5 * 4)


class Saved:
    """Counts the bytes that a forward pass keeps for the backward pass, each storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        self.storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def of_size(self, numel: int) -> list[Tensor]:
        return [t for t in self.storages.values() if t.numel() == numel]


def test_two_layers_on_one_input_keep_it_once_and_turned() -> None:
    """Wide enough for the sampled gather to pay."""
    tokens, width = 4, 400

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            return self.one(x) + self.two(x)

    model = get_peft_model(Two(), SpIELConfig(r=1, target_modules=["one", "two"]))
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        model(torch.randn(tokens, width, requires_grad=True))
    (kept,) = saved.of_size(tokens * width)
    assert is_turned(kept)


def test_a_view_is_kept_as_it_is() -> None:
    """Attention's output is a view of a tensor that attention keeps anyway: a copy would be extra memory."""
    model = adapt(nn.Linear(400, 400), k=500)
    x = torch.randn(4, 20, 20, requires_grad=True) * 2
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        model(x.view(4, 400))
    assert x.untyped_storage().data_ptr() in saved.storages


def test_an_input_that_is_overwritten_after_the_forward_pass_leaves_the_gradient_alone() -> None:
    torch.manual_seed(0)
    grads: list[Tensor] = []
    for overwrite in (False, True):
        torch.manual_seed(1)
        model = adapt(nn.Linear(400, 400), k=500)
        x = torch.randn(4, 400)
        loss = model(x).square().sum()
        if overwrite:
            x.zero_()
        loss.backward()
        grads.append(values_of(model).grad)
    assert grads[0].abs().sum() > 0
    assert_same_bits(*grads)
