"""Deltas that stay in the base weight between optimizer steps: what that may and may not be noticed by."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import HALF_AND_FULL, Single, assert_same_bits, spiel_layer, tiny_llama, transposed, values_of
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spiel_kernels import apply_deltas
from spiel_peft import SpIELConfig
from spiel_peft.layers import base as layer_base

X = torch.linspace(-1, 1, 27).view(3, 9)


def stepping(
    layer: nn.Module | None = None, adapters: tuple[str, ...] = ("default",), **config: Any
) -> tuple[PeftModel, torch.optim.Optimizer]:
    """A model in the middle of a run: one step done, more to come."""
    layer = nn.Linear(9, 7) if layer is None else layer
    settings = {"num_deltas": 20, "init_weights": False, "growth": "none", "target_modules": ["layer"], **config}
    model = get_peft_model(Single(layer), SpIELConfig(**settings), adapter_name=adapters[0]).train()
    for number, name in enumerate(adapters[1:], start=1):
        model.add_adapter(name, SpIELConfig(**{**settings, "seed": number}))
    model.base_model.set_adapter(list(adapters))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor = X) -> None:
    dtype = next(model.parameters()).dtype
    model(x.to(dtype)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def stored(model: nn.Module) -> Tensor:
    """The base weight as it lies in memory, asked for in a way that unfolds nothing."""
    return spiel_layer(model).base_layer.weight.detach()


def adapted(original: Tensor, model: nn.Module) -> Tensor:
    deltas = spiel_layer(model).spiel_delta
    return apply_deltas(original, [(d.indices, d.values.detach()) for d in deltas.values()])


@pytest.mark.parametrize("adapters", [("default",), ("default", "other")], ids=["one-adapter", "two-adapters"])
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
def test_folded_from_the_first_forward_after_a_step_to_the_next_step(
    dtype: torch.dtype, adapters: tuple[str, ...]
) -> None:
    layer = nn.Linear(9, 7).to(dtype)
    original = layer.weight.detach().clone()
    model, optimizer = stepping(layer, adapters)
    assert_same_bits(stored(model), original)
    for _ in range(2):
        loss = model(X.to(dtype)).sum()
        assert_same_bits(stored(model), adapted(original, model))
        loss.backward()
        assert_same_bits(stored(model), adapted(original, model))
    optimizer.step()
    assert_same_bits(stored(model), original)


@pytest.mark.parametrize("layer", [nn.Linear(9, 7), transposed(9, 7), nn.Conv1d(3, 4, 2)], ids=["linear", "tf", "conv"])
def test_all_kinds_of_layers_stay_folded(layer: nn.Module) -> None:
    original = layer.weight.detach().clone()
    x = X.view(3, 3, 3) if isinstance(layer, nn.Conv1d) else X
    model = get_peft_model(
        Single(layer), SpIELConfig(num_deltas=9, init_weights=False, target_modules=["layer"], growth="none")
    )
    optimizer = torch.optim.SGD([values_of(model)], lr=0.1)
    step(model, optimizer, x)
    model(x).sum().backward()
    assert_same_bits(stored(model), adapted(original, model))
    optimizer.step()
    assert_same_bits(stored(model), original)


def test_hooks_of_the_user_find_the_base_weight_unfolded() -> None:
    model, optimizer = stepping()
    original = stored(model).clone()
    seen: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(stored(model).clone()))
    optimizer.register_step_post_hook(lambda *_: seen.append(stored(model).clone()))
    model(X).sum().backward()
    optimizer.step()
    assert len(seen) == 2
    for weight in seen:
        assert_same_bits(weight, original)


def test_nothing_stays_before_the_first_and_after_the_last_step() -> None:
    layer = nn.Linear(9, 7)
    original = layer.weight.detach().clone()
    config = SpIELConfig(num_deltas=9, init_weights=False, growth="none", target_modules=["layer"], total_steps=2)
    model = get_peft_model(Single(layer), config)
    optimizer = torch.optim.SGD([values_of(model)], lr=0.1)
    model(X)
    assert_same_bits(stored(model), original)
    step(model, optimizer)
    model(X)
    assert not torch.equal(stored(model), original)
    step(model, optimizer)
    model(X)
    assert_same_bits(stored(model), original)


def test_passes_without_gradients_fold_transiently() -> None:
    model, _ = stepping()
    original = stored(model).clone()
    with torch.no_grad():
        out = model(X)
    assert_same_bits(stored(model), original)
    assert_same_bits(model(X).detach(), out)
    with torch.no_grad():
        assert_same_bits(model(X), out)
    assert_same_bits(stored(model), adapted(original, model))
    with torch.inference_mode():
        assert_same_bits(model(X).clone(), out)


# Ways to look at the base weight between a forward pass and the step.


def pickled(model: PeftModel) -> PeftModel:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


KEY = "base_model.model.layer.base_layer.weight"
WAYS: dict[str, Callable[[PeftModel], Tensor]] = {
    "state_dict": lambda model: model.state_dict()[KEY],
    "state_dict of the model inside": lambda model: model.get_base_model().state_dict()["layer.base_layer.weight"],
    "state_dict of the layer": lambda model: spiel_layer(model).state_dict()["base_layer.weight"],
    "deepcopy": lambda model: stored(copy.deepcopy(model)),
    "deepcopy of the model inside": lambda model: stored(copy.deepcopy(model.get_base_model())),
    "pickle": lambda model: stored(pickled(model)),
    "to": lambda model: stored(model.to(torch.float64)).float(),
    "half and back": lambda model: stored(model.half().float()),
    "eval": lambda model: stored(model.eval()),
    "weight": lambda model: spiel_layer(model).weight.detach(),
    "get_base_weight": lambda model: spiel_layer(model).get_base_weight().detach(),
    "unload": lambda model: model.unload().layer.weight.detach(),
    "delete_adapter": lambda model: (model.delete_adapter("other"), stored(model))[1],
    "set_adapter": lambda model: (model.set_adapter("other"), stored(model))[1],
    "merge and unmerge": lambda model: (model.merge_adapter(), model.unmerge_adapter(), stored(model))[2],
    "load_state_dict": lambda model: (model.load_state_dict(model.state_dict()), stored(model))[1],
}


@pytest.mark.parametrize("way", WAYS)
def test_whoever_looks_in_between_sees_the_original(way: str) -> None:
    model, _ = stepping(adapters=("default", "other"))
    original = stored(model).clone()
    model(X).sum().backward()
    assert not torch.equal(stored(model), original)
    seen = WAYS[way](model)
    expected = original.half().float() if way == "half and back" else original
    assert_same_bits(seen, expected)


def test_loading_into_a_folded_weight_keeps_what_was_loaded() -> None:
    model, optimizer = stepping()
    loaded = {**model.state_dict(), KEY: torch.randn(7, 9)}
    model(X).sum().backward()
    model.load_state_dict(loaded)
    assert_same_bits(stored(model), loaded[KEY])
    optimizer.step()
    assert_same_bits(stored(model), loaded[KEY])


def test_loading_an_adapter_while_folded() -> None:
    model, optimizer = stepping()
    original = stored(model).clone()
    delta = spiel_layer(model).spiel_delta["default"]
    incoming = {"indices": torch.arange(20, dtype=torch.int32), "values": torch.randn(20)}
    model(X).sum().backward()
    delta.load_state_dict(incoming)
    assert_same_bits(stored(model), original)
    optimizer.step()
    assert_same_bits(stored(model), original)


def test_merging_between_forward_and_step_uses_the_originals() -> None:
    model, optimizer = stepping()
    original = stored(model).clone()
    model(X).sum().backward()
    model.merge_adapter()
    assert_same_bits(stored(model), adapted(original, model))
    model.unmerge_adapter()
    optimizer.step()
    assert_same_bits(stored(model), original)


# Orders of calls


def gradient_of(model: nn.Module, backward: Callable[[], None]) -> Tensor:
    model.zero_grad()
    backward()
    return values_of(model).grad.clone()


def test_disabled_pass_between_forward_and_backward() -> None:
    """TRL's DPO computes the reference between the policy's forward pass and its backward pass."""
    model, optimizer = stepping()
    original = stored(model).clone()
    expected = gradient_of(model, lambda: model(X).square().sum().backward())
    loss = model(X).square().sum()
    with torch.no_grad(), model.disable_adapter():
        reference = model(X)
    base = spiel_layer(model).base_layer
    assert_same_bits(reference, nn.functional.linear(X, original, base.bias).detach())
    assert_same_bits(gradient_of(model, loss.backward), expected)
    optimizer.step()
    assert_same_bits(stored(model), original)


def test_switch_of_adapters_between_forward_and_backward() -> None:
    model, optimizer = stepping(adapters=("default", "other"))
    original = stored(model).clone()
    model.set_adapter("default")
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    expected, expected_x = values_of(model).grad.clone(), x.grad.clone()
    x.grad = None
    model.zero_grad()
    loss = model(x).square().sum()
    model.base_model.set_adapter("other")
    model(X)
    values_of(model).requires_grad_(True)
    loss.backward()
    assert_same_bits(values_of(model).grad, expected)
    assert_same_bits(x.grad, expected_x)
    optimizer.step()
    assert_same_bits(stored(model), original)


def test_several_forwards_before_their_backwards() -> None:
    model, optimizer = stepping()
    original = stored(model).clone()
    expected = gradient_of(model, lambda: (model(X).square().sum() + model(2 * X).sum()).backward())

    def both() -> None:
        first, second = model(X).square().sum(), model(2 * X).sum()
        first.backward()
        second.backward()

    assert_same_bits(gradient_of(model, both), expected)
    optimizer.step()
    assert_same_bits(stored(model), original)


def test_values_changed_through_data_are_seen_by_the_next_forward() -> None:
    model, optimizer = stepping()
    original = stored(model).clone()
    model(X)
    values_of(model).data.mul_(3.0)
    out = model(X)
    assert_same_bits(stored(model), adapted(original, model))
    base = spiel_layer(model).base_layer
    assert_same_bits(out.detach(), nn.functional.linear(X, adapted(original, model), base.bias).detach())
    optimizer.step()
    assert_same_bits(stored(model), original)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed_passes(use_reentrant: bool) -> None:
    model, optimizer = stepping()
    original = stored(model).clone()
    x = X.clone().requires_grad_()
    expected = gradient_of(model, lambda: model(x).square().sum().backward())
    again = gradient_of(model, lambda: checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward())
    assert_same_bits(again, expected)
    optimizer.step()
    assert_same_bits(stored(model), original)


def test_a_closure_runs_passes_inside_the_step() -> None:
    model, optimizer = stepping()
    original = stored(model).clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(X).square().sum()
        loss.backward()
        return loss

    before = values_of(model).detach().clone()
    optimizer.step(closure)
    assert not torch.equal(values_of(model), before)
    assert_same_bits(stored(model), original)


def test_a_step_that_a_scaler_leaves_out_does_no_harm() -> None:
    model, optimizer = stepping()
    original = stored(model).clone()
    for _ in range(3):
        model(X).sum().backward()
        optimizer.zero_grad()
        assert_same_bits(stored(model), adapted(original, model))
    step(model, optimizer)
    assert_same_bits(stored(model), original)


# Somebody writes to the weight meanwhile


def test_backward_after_a_write_to_the_weight_is_refused() -> None:
    model, _ = stepping()
    loss = model(X.clone().requires_grad_()).sum()
    with torch.no_grad():
        spiel_layer(model).base_layer.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="base weight was changed"):
        loss.backward()


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "some-entries"])
def test_what_others_write_stays(whole: bool) -> None:
    model, optimizer = stepping()
    expected = stored(model).clone()
    written = torch.randn(7, 9)
    model(X).sum().backward()
    rows = slice(None) if whole else slice(2, 4)
    expected[rows] = written[rows]
    with torch.no_grad():
        spiel_layer(model).base_layer.weight[rows] = written[rows]
    optimizer.step()
    assert_same_bits(stored(model), expected)


def test_indices_changed_while_folded_are_an_error() -> None:
    model, optimizer = stepping()
    model(X).sum().backward()
    spiel_layer(model).spiel_delta["default"].indices.add_(1)
    with pytest.raises(RuntimeError, match="indices of a delta were changed while it was folded"):
        optimizer.step()


# Where nothing may stay


def test_a_trained_base_weight_is_never_left_folded() -> None:
    model, _ = stepping()
    weight = spiel_layer(model).base_layer.weight.requires_grad_()
    original = stored(model).clone()
    model(X).sum().backward()
    assert weight.grad is not None
    assert_same_bits(stored(model), original)


def test_memory_of_other_processes_is_never_left_folded() -> None:
    layer = nn.Linear(9, 7)
    layer.weight.data.share_memory_()
    model, _ = stepping(layer)
    original = stored(model).clone()
    model(X).sum().backward()
    assert_same_bits(stored(model), original)


def test_a_copy_belongs_to_no_optimizer_and_is_not_left_folded() -> None:
    model, _ = stepping()
    other = copy.deepcopy(model)
    original = stored(other).clone()
    other(X).sum().backward()
    assert_same_bits(stored(other), original)


def test_tied_weights_are_never_left_folded() -> None:
    base = tiny_llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    config = SpIELConfig(num_deltas=40, init_weights=False, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(base, config).train()
    original = base.get_input_embeddings().base_layer.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(12).view(2, 6)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        assert_same_bits(base.get_input_embeddings().base_layer.weight.detach(), original)
        optimizer.step()


# Whole runs


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("growth", ["accumulated_gradient", "momentum"])
def test_a_run_is_the_same_with_and_without_staying(
    growth: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(stay: bool) -> tuple[dict[str, Tensor], list[Tensor]]:
        torch.manual_seed(0)
        with monkeypatch.context() as patch:
            if not stay:
                patch.setattr(layer_base, "can_stay_folded", lambda parameter: False)
            config = SpIELConfig(r=2, growth=growth, regrow_every=3, accumulation_steps=2, total_steps=12)
            base = tiny_llama()
            originals = {name: p.detach().clone() for name, p in base.named_parameters()}
            model = get_peft_model(base, config).train()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            ids = torch.arange(24).view(2, 12)
            losses = []
            for _ in range(9):
                for half in ids:
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                        loss = model(input_ids=half[None], labels=half[None]).loss
                    loss.backward()
                    losses.append(loss.detach())
                optimizer.step()
                optimizer.zero_grad()
            weights = {n.replace("base_layer.", ""): p.detach() for n, p in model.get_base_model().named_parameters()}
            for name, original in originals.items():
                assert_same_bits(weights[name], original, name)
        return {n: t.clone() for n, t in model.state_dict().items() if "spiel" in n}, losses

    kept, losses = run(stay=True)
    again, losses_again = run(stay=False)
    for name, tensor in kept.items():
        assert_same_bits(tensor, again[name], name)
    for one, other in zip(losses, losses_again, strict=True):
        assert_same_bits(one, other)
