"""A model that is not of transformers: examples/sense_lm.py, and embeddings of every kind."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from helpers import assert_same_bits

import sense_lm
from spiel_peft import SpIELConfig, SpIELLayer, SpIELOptimizer, SpIELParameter

ADAPTED = 4 + 2 * 6 + 1  # the table, the priors, two linears; two blocks of six; the bag


@pytest.fixture(scope="module")
def pretrained() -> sense_lm.SenseLM:
    """A small sense-embedding model, trained for a few steps."""
    torch.manual_seed(0)
    model = sense_lm.SenseLM(len(sense_lm.VOCABULARY), senses=2, width=16, heads=2)
    data = sense_lm.make_sentences(sense_lm.BEFORE, 200, seed=1)
    sense_lm.train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), data, 40, 32)
    return model


def train(model: PeftModel, steps: int = 80) -> None:
    data = sense_lm.make_sentences(sense_lm.AFTER, 200, seed=2)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = SpIELOptimizer(torch.optim.AdamW(trained, lr=1e-2), model, total_steps=steps)
    sense_lm.train(model, optimizer, data, steps, 32)


def layers_of(model: nn.Module) -> dict[str, SpIELLayer]:
    return {module.module_name: module for module in model.modules() if isinstance(module, SpIELLayer)}


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model.eval()(sense_lm.make_sentences(sense_lm.AFTER, 16, seed=3))


@pytest.mark.parametrize("growth", ["accumulated_gradient", "momentum"])
def test_sense_embeddings_train_and_everything_else_is_exact(
    growth: str, pretrained: sense_lm.SenseLM, tmp_path: Path
) -> None:
    base = copy.deepcopy(pretrained)
    model = sense_lm.adapt(base, growth, regrow_every=5, accumulation_steps=3)
    layers = layers_of(model)
    assert len(layers) == ADAPTED and isinstance(layers["topic.weight"], SpIELParameter)
    start = {name: layer.spiel_delta["default"].indices.clone() for name, layer in layers.items()}
    assert_same_bits(outputs(model), outputs(pretrained))

    new = sense_lm.make_sentences(sense_lm.AFTER, 200, seed=4)
    before = sense_lm.held_out_loss(model, new)
    train(model)
    assert sense_lm.held_out_loss(model, new) < before - 0.2
    for name, layer in layers.items():
        indices = layer.spiel_delta["default"].indices
        assert not torch.equal(indices, start[name]), name
        assert bool((indices.diff() > 0).all()) and int(indices[-1]) < layer.info.numel

    adapted = outputs(model)
    with model.disable_adapter():
        assert_same_bits(outputs(model), outputs(pretrained))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(pretrained), tmp_path)
    assert_same_bits(outputs(loaded), adapted)
    model.merge_adapter(safe_merge=True)
    assert_same_bits(outputs(model), adapted)
    model.unmerge_adapter()
    for name, value in pretrained.state_dict().items():
        live = {key.replace(".base_layer", ""): v for key, v in model.base_model.model.state_dict().items()}
        assert_same_bits(live[name], value, name)
    merged = model.merge_and_unload()
    assert type(merged) is sense_lm.SenseLM
    assert set(merged.state_dict()) == set(pretrained.state_dict())
    assert_same_bits(outputs(merged), adapted)


def test_padding_row_is_left_alone(pretrained: sense_lm.SenseLM) -> None:
    model = sense_lm.adapt(copy.deepcopy(pretrained), "accumulated_gradient", density=0.3)
    width = pretrained.table.embedding_dim
    delta = layers_of(model)["table"].spiel_delta["default"]
    assert int((delta.indices < width).sum()) > 0  # the random start
    train(model, steps=8)
    in_padding = delta.indices < width
    assert not delta.values[in_padding].any()
    assert torch.equal(model.base_model.model.table(torch.tensor([0])), pretrained.table.weight[:1])


def test_the_script_learns_new_uses(capsys: pytest.CaptureFixture[str]) -> None:
    sense_lm.main(["--growth", "momentum", "--pretraining-steps", "60", "--steps", "40"])
    lines = capsys.readouterr().out.splitlines()
    losses = {line.partition(":")[0]: [float(n) for n in re.findall(r"\d\.\d+", line)] for line in lines}
    assert losses["with deltas"][1] < losses["trained whole"][1] - 0.1
    assert losses["without them"] == losses["trained whole"] and losses["merged"] == losses["with deltas"]


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
    (layer,) = layers_of(model).values()
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


def test_code_of_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "any-model.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    experts, beside = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(experts, names)
    assert sum(isinstance(module, SpIELParameter) for module in names["model"].modules()) == 4
    exec(beside, names)
    kinds = {n.split(".")[-3] for n, p in names["model"].named_parameters() if p.requires_grad}
    assert kinds == {"spiel_delta", "lora_A", "lora_B"}
