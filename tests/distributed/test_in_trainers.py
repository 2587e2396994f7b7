"""Hugging Face's Trainer and an Accelerate loop on two ranks, and resuming what they have saved."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import PeftModel
from support.adapters import deltas_of, log_of
from support.ranks import launch, results_of, run_here
from support.runs import adamw, adapt, batch
from support.trainer_runs import Regression
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from distributed.runs import FIELDS, assert_equal, assert_lockstep, snapshot
from spiel_peft import SpIELCallback

RANKS, STEPS = 2, 12
TARGETS = ["net.0", "net.2"]


def regression() -> PeftModel:
    return adapt(Regression(), target_modules=TARGETS, **{**FIELDS, "total_steps": None})


def rows(count: int = 64) -> list[dict[str, Tensor]]:
    x, y = batch(0, size=count)
    return [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]


def trainer(model: nn.Module, folder: Path, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    return Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=[SpIELCallback()])


def outcome(run: Trainer) -> dict[str, Any]:
    optimizer = run.optimizer.optimizer
    model = run.model
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return {
        "snapshot": snapshot(model, optimizer),
        "closes": [report.step for report in log_of(model)],
        "wrapped": type(run.model_wrapped).__name__,
        "losses": losses,
    }


def reset_accelerate() -> None:
    """Reset Accelerate's global state, so that each scenario starts as in a new process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def by_trainer(rank: int, resume: int | None = None, **settings: Any) -> dict[str, Any]:
    """The first training saves after every step; the others resume from its checkpoints."""
    reset_accelerate()
    folder = Path(sys.argv[1])
    if resume is None:
        run = trainer(regression(), folder / "whole", save_strategy="steps", save_steps=1, logging_steps=4, **settings)
        run.train()
    else:
        run = trainer(regression(), folder / f"from{resume}", **settings)
        run.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{resume}"))
    return outcome(run)


def by_accelerate(rank: int) -> list[dict[str, Tensor]]:
    reset_accelerate()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = adapt(**FIELDS)
    optimizer = adamw(model)
    x, y = batch(0, size=64)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    wrapped, stepper, loader = accelerator.prepare(model, optimizer, loader)
    out = []
    for _ in range(3):
        for inputs, labels in loader:
            with accelerator.accumulate(wrapped):
                accelerator.backward((wrapped(inputs) - labels).square().mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 0.1)
                stepper.step()
                stepper.zero_grad()
            if accelerator.sync_gradients:
                out.append(snapshot(model, stepper.optimizer))
    return out


# Windows are steps 1 and 2, 5 and 6, 9 and 10; candidates are proposed in step 4 and 8. From a window, from a close,
# from between a proposal and its window.
RESUMED_AT = [1, 3, 4, 5, 6]
SCENARIOS = {
    "trainer": by_trainer,
    **{f"resumed at {step}": partial(by_trainer, resume=step) for step in RESUMED_AT},
    "trainer, accumulating": partial(by_trainer, resume=2, gradient_accumulation_steps=2),
    "accelerate": by_accelerate,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainers")


@pytest.fixture(scope="module")
def launched(folder: Path) -> dict[str, list[Any]]:
    return launch(__file__, folder, RANKS)


def test_trainer_on_two_ranks(launched: dict[str, list[Any]]) -> None:
    by_rank = results_of(launched, "trainer")
    assert_equal([result["snapshot"] for result in by_rank])
    assert [result["wrapped"] for result in by_rank] == ["DistributedDataParallel"] * RANKS
    assert by_rank[0]["closes"] == [2, 6, 10]
    assert (by_rank[0]["snapshot"]["replaced"] > 0).all()
    assert by_rank[0]["losses"][-1] < by_rank[0]["losses"][0]


@pytest.mark.parametrize("step", RESUMED_AT)
def test_resumed_on_as_many_ranks_the_run_ends_the_same(launched: dict[str, list[Any]], step: int) -> None:
    whole = results_of(launched, "trainer")[0]["snapshot"]
    for result in results_of(launched, f"resumed at {step}"):
        assert result["closes"] == [close for close in (2, 6, 10) if close > step]
        for key, tensor in result["snapshot"].items():
            assert key == "replaced" or torch.equal(tensor, whole[key]), key


def test_trainer_with_accumulation(launched: dict[str, list[Any]]) -> None:
    by_rank = results_of(launched, "trainer, accumulating")
    assert_equal([result["snapshot"] for result in by_rank])
    assert by_rank[0]["closes"] == [6, 10]


@pytest.mark.parametrize("step", [3, 4, 5])
def test_one_process_continues_a_run_of_two_ranks(
    launched: dict[str, list[Any]], folder: Path, tmp_path: Path, step: int
) -> None:
    """A checkpoint has no state of single ranks, so one process can continue a run of two."""
    model = regression()
    run = trainer(model, tmp_path)
    run.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{step}"))
    assert [report.step for report in log_of(model)] == [6, 10]
    assert all(report.replaced > 0 for report in log_of(model))
    for delta in deltas_of(model).values():
        assert delta.state.step == STEPS


def test_two_ranks_save_the_window_that_they_have_opened_early(launched: dict[str, list[Any]], folder: Path) -> None:
    for step, steps_in_window in ((1, 1), (3, None), (4, 0), (5, 1), (6, None), (8, 0)):
        loaded = PeftModel.from_pretrained(Regression(), folder / "whole" / f"checkpoint-{step}", is_trainable=True)
        for delta in deltas_of(loaded).values():
            window = delta.state.window
            assert (window.steps if window is not None else None) == steps_in_window


def test_accelerate_on_two_ranks(launched: dict[str, list[Any]]) -> None:
    by_rank = results_of(launched, "accelerate")
    assert_lockstep(by_rank)
    assert by_rank[0][-1]["replaced"].numel() == 3
    assert (by_rank[0][-1]["replaced"] > 0).all()


if __name__ == "__main__":
    run_here(SCENARIOS, RANKS)
