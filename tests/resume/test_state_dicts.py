"""A run that is saved and loaded in any of the usual ways goes on bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.adapters import deltas_of, log_of
from support.models import mlp
from support.runs import assert_same

from .helpers import GROWTHS, OPTIMIZERS, STEPS, Run

Route = Callable[[Run, Path], Run]


def save_optimizer(run: Run, folder: Path) -> None:
    torch.save(run.optimizer.state_dict(), folder / "optimizer.pt")


def load_optimizer(run: Run, folder: Path) -> None:
    run.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))


def state_dicts(run: Run, folder: Path) -> Run:
    torch.save(run.model.state_dict(), folder / "model.pt")
    save_optimizer(run, folder)
    again = run.again()
    again.model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    load_optimizer(again, folder)
    return again


def optimizer_first(run: Run, folder: Path) -> Run:
    again = run.again()
    again.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    again.model.load_state_dict({name: tensor.clone() for name, tensor in run.model.state_dict().items()})
    return again


def safetensors(run: Run, folder: Path) -> Run:
    save_file(run.model.state_dict(), folder / "model.safetensors")
    save_optimizer(run, folder)
    again = run.again()
    again.model.load_state_dict(load_file(folder / "model.safetensors"))
    load_optimizer(again, folder)
    return again


def save_pretrained(run: Run, folder: Path) -> Run:
    run.model.save_pretrained(folder)
    save_optimizer(run, folder)
    again = run.again()
    again.use(PeftModel.from_pretrained(mlp(), folder, is_trainable=True))
    load_optimizer(again, folder)
    return again


def load_adapter(run: Run, folder: Path) -> Run:
    run.model.save_pretrained(folder)
    save_optimizer(run, folder)
    again = run.again()
    again.model.load_adapter(folder, "default", is_trainable=True)
    load_optimizer(again, folder)
    return again


def accelerate_state(run: Run, folder: Path, safe: bool = True) -> Run:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(run.model, run.optimizer)
    accelerator.save_state(folder, safe_serialization=safe)
    again, other = run.again(), Accelerator(cpu=True)
    other.prepare(again.model, again.optimizer)
    other.load_state(folder)
    return again


def accelerate_pickled(run: Run, folder: Path) -> Run:
    return accelerate_state(run, folder, safe=False)


def same_objects(run: Run, folder: Path) -> Run:
    """After more training, an earlier state is loaded; the training in between must have no effect."""
    model, optimizer = copy.deepcopy(run.model.state_dict()), copy.deepcopy(run.optimizer.state_dict())
    taken = int(next(iter(deltas_of(run.model).values())).state.step)
    run.train(taken + 1, taken + 4)
    run.model.load_state_dict(model)
    run.optimizer.load_state_dict(optimizer)
    return run


def twice(run: Run, folder: Path) -> Run:
    """A loaded run is saved again before it is trained."""
    once = state_dicts(run, folder)
    return state_dicts(once, folder)


ROUTES = [
    state_dicts,
    optimizer_first,
    safetensors,
    save_pretrained,
    load_adapter,
    accelerate_state,
    accelerate_pickled,
    same_objects,
    twice,
]
by_name = {"ids": lambda route: route.__name__}


def resumed(run: Run, stop: int, route: Route, folder: Path) -> Run:
    folder.mkdir(exist_ok=True)
    return route(run.train(1, stop), folder).train(stop + 1)


@pytest.mark.parametrize("route", ROUTES, **by_name)
def test_every_route_at_every_step_of_a_cycle(route: Route, tmp_path: Path) -> None:
    whole = Run().train(1)
    assert [report.step for report in log_of(whole.model)] == [3, 8, 13]
    for stop in (1, 2, 3, 5, 6, 7):
        assert_same(resumed(Run(), stop, route, tmp_path / str(stop)).everything(), whole.everything())


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_and_criterion(optimizer: str, growth: str, tmp_path: Path) -> None:
    settings = {"optimizer": optimizer, "growth": growth}
    whole = Run(**settings).train(1)
    assert sum(report.replaced for report in log_of(whole.model)) > 0
    for stop in (2, 4, 7):
        assert_same(resumed(Run(**settings), stop, state_dicts, tmp_path).everything(), whole.everything())


@pytest.mark.parametrize("route", [state_dicts, save_pretrained, accelerate_state], **by_name)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_gradient_accumulation(route: Route, optimizer: str, tmp_path: Path) -> None:
    settings = {"optimizer": optimizer, "micro_batches": 3}
    whole = Run(**settings).train(1)
    for stop in (2, 7):
        assert_same(resumed(Run(**settings), stop, route, tmp_path / str(stop)).everything(), whole.everything())


@pytest.mark.parametrize("route", [state_dicts, save_pretrained, same_objects], **by_name)
def test_through_the_wrapper(route: Route, tmp_path: Path) -> None:
    whole = Run().train(1)
    for stop in (2, 4, 7):
        assert_same(resumed(Run(wrapped=True), stop, route, tmp_path / str(stop)).everything(), whole.everything())


@pytest.mark.parametrize("total_steps", [20, None])
def test_windows_of_few_candidates(total_steps: int | None, tmp_path: Path) -> None:
    """What a window chose stays chosen, and the next one chooses as many as in the whole run."""
    settings = {"candidates": 1.5, "total_steps": total_steps}
    whole = Run(**settings).train(1)
    for stop in (2, 4, 6, 7):
        run = Run(**settings).train(1, stop)
        window = next(iter(deltas_of(run.model).values())).state.window
        if stop > 5:
            assert window.positions.numel() < next(iter(deltas_of(run.model).values())).k / 2
        for route in (state_dicts, save_pretrained):
            folder = tmp_path / f"{route.__name__}{stop}"
            assert_same(resumed(Run(**settings), stop, route, folder).everything(), whole.everything())


def test_a_run_of_unknown_length(tmp_path: Path) -> None:
    """The regrow rate depends on the highest learning rate so far, which must be restored too."""

    def train(run: Run, first: int, last: int) -> Run:
        for step in range(first, last + 1):
            run.optimizer.param_groups[0]["lr"] = 0.01 if step < 4 else 0.004
            run.train(step, step)
        return run

    whole = train(Run(total_steps=None), 1, STEPS)
    assert [report.rate for report in log_of(whole.model)] == pytest.approx([1.0, 0.08, 0.08])
    again = train(state_dicts(train(Run(total_steps=None), 1, 6), tmp_path), 7, STEPS)
    assert_same(again.everything(), whole.everything())
