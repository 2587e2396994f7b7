"""Hooks for saved tensors, as activation offloading uses them, and changes between a forward and its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import bitsandbytes as bnb
import pytest
import torch
from support.layers import adapt, spiel_layer
from support.models import tiny_llama
from support.runs import adamw, assert_same_run, train
from support.runs import adapt as adapt_mlp
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from spiel_kernels.index_set import PerIndexSet


class Offload(saved_tensors_hooks):
    """Hands out copies, as tensors that come back from the CPU are, and notes the dtypes of what it was given."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()
        super().__init__(self.pack, torch.clone)

    def pack(self, tensor: Tensor) -> Tensor:
        self.dtypes.add(tensor.dtype)
        return tensor.clone()


def test_indices_are_not_offloaded_and_the_run_stays_the_same() -> None:
    expected, model = adapt_mlp(), adapt_mlp()
    train(expected, adamw(expected), 9)
    offload = Offload()
    with offload:
        train(model, adamw(model), 9)
    assert offload.dtypes and not any(dtype in (torch.int32, torch.int64) for dtype in offload.dtypes)
    assert_same_run(model, expected)


def nf4(width: int) -> nn.Module:
    layer = bnb.nn.Linear4bit(width, width, compute_dtype=torch.float32, quant_type="nf4")
    return layer.to("cpu")


@pytest.mark.parametrize("build", [lambda width: nn.Linear(width, width), nf4], ids=["plain", "nf4"])
def test_what_is_made_once_per_index_set_is_made_once_under_offloading(
    build: Callable[[int], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large enough matrices are gathered by plans and row bounds, which four passes over the same indices share."""
    made: list[object] = []
    get = PerIndexSet.get

    def counting(memory: PerIndexSet, indices: Tensor, key: tuple, compute: Callable[[], object]) -> object:
        return get(memory, indices, key, lambda: made.append(key) or compute())

    monkeypatch.setattr(PerIndexSet, "get", counting)
    counts = []
    for hooks in (None, Offload()):
        model = adapt(build(512), k=2600)
        made.clear()
        for _ in range(4):
            with hooks or nullcontext():
                loss = model(torch.randn(64, 512)).square().sum()
            loss.backward()
        counts.append(len(made))
    assert counts[0] == counts[1] == 1


def test_embeddings_and_checkpointed_models_run_under_offloading() -> None:
    from peft import get_peft_model

    from spiel_peft import SpIELConfig

    ids = torch.arange(24).view(2, 12) % 10
    grads = []
    for hooks in (None, Offload()):
        config = SpIELConfig(target_modules=["embed_tokens", "q_proj"], r=2, init_weights=False)
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), config).train()
        with hooks or nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(left, right) for left, right in zip(*grads, strict=True))


@pytest.mark.parametrize("build", [lambda: nn.Linear(8, 8), lambda: nn.Embedding(8, 8)], ids=["linear", "embedding"])
def test_indices_that_change_before_the_backward_pass_are_noticed(build: Callable[[], nn.Module]) -> None:
    model = adapt(build())
    x = torch.randint(8, (3,)) if isinstance(spiel_layer(model).get_base_layer(), nn.Embedding) else torch.randn(3, 8)
    loss = model(x).square().sum()
    delta = spiel_layer(model).spiel_delta["default"]
    with torch.no_grad():
        delta.indices.copy_(torch.arange(delta.k))
    with pytest.raises(RuntimeError, match="indices of a delta have been changed"):
        loss.backward()
