"""examples/sense_lm.py: a model that is not of transformers is adapted, trained, saved and merged."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.tensors import assert_same_bits
from torch import Tensor, nn

import sense_lm
from spiel_peft import SpIELLayer, SpIELOptimizer, SpIELParameter

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
