"""Wrong settings and inputs: clear errors before anything changes, or a defined behaviour."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from peft import PeftModel
from support.adapters import deltas_of, indices_of, log_of, trainable
from support.runs import adamw, adapt, train
from support.text import rows, texts, tokenizer
from support.trainer_runs import QUIET
from torch import nn
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from spiel_peft import SM3, SpIELCallback, SpIELConfig, SpIELOptimizer

from .helpers import adapted, arguments, assert_reloads, outputs, tiny_llama

HOLDS_NONE = "the optimizer holds none of the model's SpIEL values: build it from the trainable parameters"


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def of_another_model(model: PeftModel) -> torch.optim.Optimizer:
    return adamw(adapted())


def of_the_head_alone(model: PeftModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW([model.get_output_embeddings().weight.requires_grad_()])


def of_frozen_deltas(model: PeftModel) -> torch.optim.Optimizer:
    parameters = trainable(model)
    for p in parameters:
        p.requires_grad_(False)
    return SM3(parameters, lr=0.1)


WITHOUT_DELTAS = [of_another_model, of_the_head_alone, of_frozen_deltas]


@pytest.mark.parametrize("make", WITHOUT_DELTAS)
def test_the_wrapper_refuses_an_optimizer_without_deltas(make: Any) -> None:
    model = adapted()
    optimizer = make(model)
    before = state(model)
    with pytest.raises(ValueError, match=HOLDS_NONE):
        SpIELOptimizer(optimizer, model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("make", WITHOUT_DELTAS)
def test_the_callback_refuses_an_optimizer_without_deltas(make: Any, tmp_path: Path) -> None:
    model = adapted()
    training = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=rows(),
        callbacks=[SpIELCallback()],
        optimizers=(make(model), None),
    )
    before = state(model)
    with pytest.raises(ValueError, match=HOLDS_NONE):
        training.train()
    assert_unchanged(model, before)


def test_the_callback_refuses_a_model_without_an_adapter(tmp_path: Path) -> None:
    """The model has no adapter, as with SFTTrainer without peft_config."""
    args = SFTConfig(output_dir=str(tmp_path), max_steps=2, bf16=False, **QUIET)
    training = SFTTrainer(
        model=tiny_llama(), args=args, train_dataset=texts(), processing_class=tokenizer(), callbacks=[SpIELCallback()]
    )
    before = state(training.model)
    with pytest.raises(ValueError, match=HOLDS_NONE):
        training.train()
    assert_unchanged(training.model, before)


@pytest.mark.parametrize("callback", [False, True])
def test_a_run_of_zero_epochs_changes_nothing(callback: bool, tmp_path: Path) -> None:
    model = adapted()
    before = state(model)
    training = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=-1, num_train_epochs=0),
        train_dataset=rows(),
        callbacks=[SpIELCallback()] if callback else [],
    )
    training.train()
    assert_unchanged(model, before)
    assert log_of(model) == []
    # The next run is not harmed by it.
    training.args.num_train_epochs = 3
    training.train()
    assert [report.rate for report in log_of(model)] == pytest.approx([1.0, 0.2 * (1 - 6 / 12), 0.2 * (1 - 10 / 12)])


def test_an_adapter_saved_before_its_first_step_reloads(tmp_path: Path) -> None:
    model = adapted()
    SpIELOptimizer(adamw(model), model, total_steps=3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert all(torch.equal(delta.indices, indices_of(model)[name]) for name, delta in deltas_of(again).items())
    assert torch.equal(outputs(again), outputs(tiny_llama()))


@pytest.mark.parametrize("total_steps", [0, -3, 2.0, True, "7"])
def test_total_steps_must_be_a_positive_int(total_steps: Any) -> None:
    """Every place that takes total_steps checks it before the model or the optimizer is changed."""
    model = adapt()
    before = state(model)
    for say in (
        lambda: SpIELConfig(density=0.1, total_steps=total_steps),
        lambda: SpIELCallback(total_steps=total_steps),
        lambda: SpIELOptimizer(adamw(model), model, total_steps=total_steps),
    ):
        with pytest.raises(ValueError, match=r"total_steps`? must be (a positive int|an integer of at least 1).*got"):
            say()
    assert_unchanged(model, before)


def test_lightning_with_zero_steps(tmp_path: Path) -> None:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = adapted()

        def training_step(self, ids: torch.Tensor, number: int) -> torch.Tensor:
            raise AssertionError("no step was asked for")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.model)

    module = Module()
    before = state(module.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.Trainer(
            max_steps=0,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(module, torch.utils.data.DataLoader(torch.zeros(4, 4, dtype=torch.int64)))
    assert_unchanged(module.model, before)


@pytest.mark.parametrize("callback", [False, True])
def test_a_run_shorter_than_its_first_window(callback: bool, tmp_path: Path) -> None:
    """One warning is given; the deltas are trained at their random positions."""
    model = adapted(accumulation_steps=4)
    before = indices_of(model)
    callbacks = [SpIELCallback()] if callback else []
    with pytest.warns(UserWarning, match=r"run of 3 optimizer steps .* accumulation_steps=4.* Lower") as caught:
        Trainer(model=model, args=arguments(tmp_path, max_steps=3), train_dataset=rows(), callbacks=callbacks).train()
    assert len([w for w in caught if "accumulation_steps=4" in str(w.message)]) == 1
    assert log_of(model) == []
    for name, delta in deltas_of(model).items():
        assert torch.equal(delta.indices, before[name])
        assert delta.values.detach().any()
    model.save_pretrained(tmp_path / "adapter")
    assert_reloads(model, tmp_path / "adapter")


@pytest.mark.parametrize("growth", ["accumulated_gradient", "momentum", "random"])
@pytest.mark.parametrize("said_by", ["config", "wrapper"])
def test_a_loop_shorter_than_its_first_window(said_by: str, growth: str) -> None:
    """In a custom loop, too; no window is opened, as it would never close."""
    settings = {"total_steps": 3} if said_by == "config" else {}
    model = adapt(accumulation_steps=4, growth=growth, **settings)
    optimizer: Any = adamw(model) if said_by == "config" else SpIELOptimizer(adamw(model), model, total_steps=3)
    before = indices_of(model)
    with pytest.warns(UserWarning, match=r"run of 3 optimizer steps .* accumulation_steps=4.* Lower") as caught:
        train(model, optimizer, 3)
    assert len([w for w in caught if "accumulation_steps=4" in str(w.message)]) == 1
    assert log_of(model) == []
    for name, delta in deltas_of(model).items():
        assert torch.equal(delta.indices, before[name])
        assert delta.state.step == 3 and delta.state.window is None
        assert delta.values.detach().any()


def test_an_accumulation_window_longer_than_the_cycle_is_refused() -> None:
    with pytest.raises(ValueError, match="accumulation_steps"):
        SpIELConfig(density=0.1, regrow_every=4, accumulation_steps=5)
