"""A checkpoint of another run is refused with an error that names the difference, and nothing is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.adapters import adapted, assert_unchanged, deltas_of, edit_adapter, first_delta, snapshot, train
from support.models import tiny_llama
from support.runs import adamw, adapt, loss_of
from torch import nn

from spiel_peft.cycle.resume import GROUP_KEY

from .helpers import Run
from .llama import adapted_llama, llama_trainer

TARGETS = ["q_proj", "down_proj"]
CYCLE = {"regrow_every": 4, "accumulation_steps": 2, "num_deltas": 400}


def llama(shape: dict[str, int] | None = None, **fields: Any) -> PeftModel:
    return adapted(tiny_llama(**(shape or {})), **{"target_modules": TARGETS, **CYCLE, **fields})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with training state, saved within a window."""
    folder = tmp_path_factory.mktemp("saved")
    model = llama()
    train(model, steps=5)
    model.save_pretrained(folder)
    return folder


DIFFERENT = {
    "growth": (
        {"growth": "momentum"},
        ValueError,
        "spiel_growth' is of a run with growth='accumulated_gradient', the adapter to be resumed has growth='momentum'",
    ),
    "budget": ({"num_deltas": 500}, RuntimeError, r"size mismatch for .*another budget \(r, density or num_deltas\)"),
    "fewer modules": (
        {"target_modules": ["q_proj"], "num_deltas": 160},
        ValueError,
        r"trained modules which this adapter lacks \(model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj\)",
    ),
    "fewer layers": (
        {"shape": {"num_hidden_layers": 1}, "num_deltas": 200},
        ValueError,
        r"lacks \(model.layers.1.mlp.down_proj, model.layers.1.self_attn.q_proj\); load it into the model",
    ),
}


@pytest.mark.parametrize("different", DIFFERENT)
def test_an_adapter_file_of_another_run(saved: Path, different: str) -> None:
    """`load_adapter` onto an adapter does not read the file's config; the tensors show the difference."""
    fields, error, message = DIFFERENT[different]
    model = llama(**fields)
    before, states = snapshot(model), [delta.state for delta in deltas_of(model).values()]
    with pytest.raises(error, match=message):
        model.load_adapter(saved, "default", is_trainable=True)
    assert_unchanged(model, before)
    assert all(delta.state is state for delta, state in zip(deltas_of(model).values(), states, strict=True))
    model.load_state_dict(before)  # the refusal has left nothing behind


def test_a_model_of_another_shape(saved: Path) -> None:
    """The other adapter has as many deltas per matrix, all in range."""
    wide = adapted(tiny_llama(intermediate_size=48), num_deltas=_counts(), regrow_every=4, accumulation_steps=2)
    before = snapshot(wide)
    with pytest.raises(ValueError, match=r"weight_shape=\(16, 24\), the adapter to be resumed has .*=\(16, 48\)"):
        wide.load_adapter(saved, "default", is_trainable=True)
    assert_unchanged(wide, before)


def test_more_modules_are_refused_when_the_run_goes_on(saved: Path) -> None:
    """PEFT allows missing keys, but a mixture of a checkpoint and a new adapter must not be trained."""
    model = llama(target_modules=None, num_deltas={**_counts(), **_counts("v_proj")})
    model.load_adapter(saved, "default", is_trainable=True)
    before = snapshot(model)
    message = "'default' cannot be resumed: the checkpoint has no deltas for model.layers.0.self_attn.v_proj, "
    with pytest.raises(ValueError, match=message):
        train(model, steps=1)
    assert_unchanged(model, before)


def _counts(target: str | None = None) -> dict[str, int]:
    counts = {name: delta.k for name, delta in deltas_of(llama()).items()}
    if target is None:
        return counts
    return {name.replace("q_proj", target): k for name, k in counts.items() if "q_proj" in name}


@pytest.mark.parametrize("different", ["growth", "budget", "fewer modules"])
def test_trainer_refuses_it(tmp_path: Path, different: str) -> None:
    llama_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=4).train()
    fields: dict[str, Any] = {"growth": {"growth": "random"}, "budget": {"density": 0.2}}.get(different, {})
    model = adapted_llama(**fields)
    if different == "fewer modules":
        edit_adapter(tmp_path / "checkpoint-4", _with_another_module)
    before = snapshot(model)
    message = {
        "growth": "growth='accumulated_gradient', the adapter to be resumed has growth='random'",
        "budget": "another budget",
        "fewer modules": r"lacks \(model.layers.7.mlp.down_proj\)",
    }[different]
    with pytest.raises((ValueError, RuntimeError), match=message):
        llama_trainer(tmp_path / "again", model=model).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_unchanged(model, before)


def _with_another_module(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if "layers.1.mlp.down_proj" in key]:
        tensors[key.replace("layers.1", "layers.7")] = tensors[key].clone()


def test_frozen_adapters_and_adapters_without_training_state_load_under_any_settings(
    saved: Path, tmp_path: Path
) -> None:
    """How to begin a new run from trained deltas with another criterion."""
    frozen = PeftModel.from_pretrained(tiny_llama(), saved)
    frozen.save_pretrained(tmp_path)
    model = llama(growth="momentum")
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert first_delta(model).state.step == 0
    for name, delta in deltas_of(model).items():
        assert torch.equal(delta.values, deltas_of(frozen)[name].values)
    train(model, steps=1)


# --- plain state dicts: the optimizer's tells ---


def state_dicts(run: Run, steps: int = 4) -> tuple[dict[str, Any], dict[str, Any]]:
    run.train(1, steps)
    return copy.deepcopy(run.model.state_dict()), copy.deepcopy(run.optimizer.state_dict())


def first_step(run: Run) -> None:
    run.train(5, 5)


def at_the_step(run: Run) -> None:
    """The error comes without a backward pass."""
    for delta in deltas_of(run.model).values():
        delta.values.grad = torch.ones_like(delta.values)
    run.optimizer.step()


@pytest.mark.parametrize("go_on", [first_step, at_the_step])
def test_another_growth_criterion_under_plain_state_dicts(go_on: Callable[[Run], None]) -> None:
    model, optimizer = state_dicts(Run())
    other = Run(growth="momentum")
    other.model.load_state_dict(model)
    other.optimizer.load_state_dict(optimizer)
    before = snapshot(other.model)
    for _ in range(2):  # not just once
        with pytest.raises(ValueError, match="AdamW was loaded with is refused, .* module '0' is .* growth='momentum'"):
            go_on(other)
        assert_unchanged(other.model, before)
        assert first_delta(other.model).state.step == 0


def test_another_budget_under_plain_state_dicts() -> None:
    model, _ = state_dicts(Run())
    other = Run(density=0.3)
    before = snapshot(other.model)
    with pytest.raises(RuntimeError, match="nothing was loaded(.|\n)*size mismatch for .*indices: .*another budget"):
        other.model.load_state_dict(model)
    assert_unchanged(other.model, before)


def test_an_optimizer_of_another_budget() -> None:
    _, optimizer = state_dicts(Run())
    other = Run(density=0.3)
    other.optimizer.load_state_dict(optimizer)
    other.model.load_state_dict(other.model.state_dict())
    message = r"num_deltas=24, the adapter to be resumed has num_deltas=18 \(another budget"
    with pytest.raises(ValueError, match=message):
        other.micro_batch(5, 0)


def test_an_optimizer_of_other_modules() -> None:
    _, optimizer = state_dicts(Run())
    other = Run(target_modules=["2", "4"])
    other.optimizer.load_state_dict(optimizer)
    other.model.load_state_dict(other.model.state_dict())
    with pytest.raises(ValueError, match="that of module '0' meets module '2' at its place in the optimizer"):
        first_step(other)


def test_an_optimizer_that_holds_no_deltas_there() -> None:
    _, optimizer = state_dicts(Run())
    other = Run()
    values = [delta.values for delta in deltas_of(other.model).values()]
    other.optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros_like(values[0])), values[1]], lr=0.01)
    other.optimizer.load_state_dict(optimizer)
    with pytest.raises(ValueError, match="module '0' holds no SpIEL delta at its place"):
        at_the_step(other)


def test_model_and_optimizer_of_different_checkpoints() -> None:
    """Moments of other positions would be used silently."""
    run = Run()
    _, optimizer = state_dicts(run, 4)
    run.train(5, 8)  # a close
    other = Run()
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(optimizer)
    with pytest.raises(ValueError, match="belongs to other indices than the model has; load .* the same checkpoint"):
        first_step(other)


def test_adapter_and_optimizer_of_different_steps(tmp_path: Path) -> None:
    run = Run()
    _, optimizer = state_dicts(run, 4)
    run.train(5, 6)
    run.model.save_pretrained(tmp_path)
    other = Run()
    other.model.load_adapter(tmp_path, "default", is_trainable=True)
    other.optimizer.load_state_dict(optimizer)
    with pytest.raises(ValueError, match="was saved after step 4, while the adapter is at step 6; load model and opt"):
        first_step(other)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no progress": (lambda entry: entry.pop("spiel_progress"), "is missing"),
    "text": (lambda entry: entry.update(spiel_progress="abc"), "is damaged"),
    "nested": (lambda entry: entry.update(spiel_settings=[[1]]), "must be five int64 numbers"),
    "zero rows": (lambda entry: entry.update(spiel_settings=[24, 0, 6, 5, 3]), "has a number out of range"),
    "no growth": (lambda entry: entry.pop("spiel_growth"), "is missing, while the rest of the run's settings"),
    "window of lists": (lambda entry: entry.update(spiel_candidates=[1, 2]), "is damaged"),
    "a huge number": (lambda entry: entry.update(spiel_progress=[2**70, 0, 0, 0, 0]), "is damaged"),
    "window out of range": (
        lambda entry: entry.update(spiel_candidates=entry["spiel_candidates"] + 1000),
        "out of range",
    ),
    "no place": (lambda entry: entry.update(position=99), "holds no SpIEL delta at its place"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_optimizer_file(damage: str) -> None:
    edit, message = DAMAGE[damage]
    model, optimizer = state_dicts(Run(), 7)
    edit(optimizer["param_groups"][0][GROUP_KEY][1])
    other = Run()
    other.model.load_state_dict(model)
    other.optimizer.load_state_dict(optimizer)
    before = snapshot(other.model)
    with pytest.raises(ValueError, match=f"module '2' .*{message}"):
        other.train(8, 8)
    assert_unchanged(other.model, before)
    assert all(delta.state.step == 0 for delta in deltas_of(other.model).values())


def test_an_entry_that_is_no_list() -> None:
    other = Run()
    other.optimizer.param_groups[0][GROUP_KEY] = "x"
    with pytest.raises(ValueError, match="its entry 'spiel_training_state' is damaged"):
        at_the_step(other)


def test_optimizers_of_other_models_do_not_matter() -> None:
    """An optimizer of another model's deltas is loaded and never used."""
    _, optimizer = state_dicts(Run())
    idle = Run(growth="momentum")
    idle.optimizer.load_state_dict(optimizer)
    model = adapt()
    for delta in deltas_of(model).values():
        delta.values.data.fill_(0.01)  # as if loaded: the optimizers are looked through
    loss_of(model, 1).backward()
    adamw(model).step()
    assert first_delta(model).state.step == 1
    assert GROUP_KEY in idle.optimizer.param_groups[0]
