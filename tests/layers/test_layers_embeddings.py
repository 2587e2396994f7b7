"""Embeddings and embedding bags with every option: their gradients, and the options that are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.adapters import layers_of
from support.tensors import assert_same_bits
from torch import Tensor, nn

from spiel_peft import SpIELConfig


class Embedded(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


TABLES: dict[str, tuple[Any, dict[str, Any]]] = {
    "embedding": (lambda: nn.Embedding(7, 4), {"target_modules": ["table"]}),
    "padding": (lambda: nn.Embedding(7, 4, padding_idx=0), {"target_modules": ["table"]}),
    "by frequency": (lambda: nn.Embedding(7, 4, scale_grad_by_freq=True), {"target_modules": ["table"]}),
    "sparse": (lambda: nn.Embedding(7, 4, sparse=True), {"target_modules": ["table"]}),
    "from pretrained": (lambda: nn.Embedding.from_pretrained(torch.randn(7, 4)), {"target_modules": ["table"]}),
    "bag": (lambda: nn.EmbeddingBag(7, 4), {"target_parameters": ["table.weight"]}),
    "bag of maxima": (lambda: nn.EmbeddingBag(7, 4, mode="max"), {"target_parameters": ["table.weight"]}),
    "bag with padding": (lambda: nn.EmbeddingBag(7, 4, padding_idx=0), {"target_parameters": ["table.weight"]}),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_every_kind_have_the_dense_gradient(kind: str) -> None:
    make, targets = TABLES[kind]
    torch.manual_seed(0)
    table = make()
    dense = copy.deepcopy(table).requires_grad_()
    dense.sparse = False
    model = get_peft_model(Embedded(table), SpIELConfig(density=0.5, init_weights=False, growth="none", **targets))
    (layer,) = layers_of(model)
    ids = torch.tensor([[0, 2, 2, 5], [3, 0, 6, 1]])
    out = model(ids)
    weights = torch.randn(out.shape)
    (out * weights).sum().backward()
    dense.weight.data += layer.get_delta_weight("default")
    expected = dense(ids)
    (expected * weights).sum().backward()
    delta = layer.spiel_delta["default"]
    assert_same_bits(out.detach(), expected.detach())
    torch.testing.assert_close(delta.values.grad, dense.weight.grad.flatten()[delta.indices.long()])
    merged = model.merge_and_unload()
    assert_same_bits(merged(ids).detach(), out.detach())


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "max_norm": (lambda: nn.Embedding(7, 4, max_norm=1.0), {"target_modules": ["table"]}, "an embedding with max_norm"),
    "bag as a module": (
        lambda: nn.EmbeddingBag(7, 4),
        {"target_modules": ["table"]},
        r"is not a supported layer; target_parameters can name its parameters \(weight\)",
    ),
    "bag with max_norm": (
        lambda: nn.EmbeddingBag(7, 4, max_norm=1.0),
        {"target_parameters": ["table.weight"]},
        "an embedding with max_norm",
    ),
    "sparse bag": (
        lambda: nn.EmbeddingBag(7, 4, sparse=True),
        {"target_parameters": ["table.weight"]},
        "gradients are sparse tensors; set its `sparse` to False",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tables_that_cannot_be_adapted_are_refused(kind: str) -> None:
    make, targets, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        get_peft_model(Embedded(make()), SpIELConfig(density=0.5, **targets))
