"""A close that an exception interrupts at any operation is finished before the deltas are used again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.adapters import deltas_of, log_of
from support.runs import adamw, adapt, assert_same_run, assert_sound, loss_of, registered_criteria, train
from support.tensors import Failing

from spiel_peft import register_growth_criterion
from spiel_peft.cycle import engine

CLOSE = 3  # the second one: its rate is below 1, so that some deltas are kept

STEPS = 5
TIMES = {"regrow_every": 2, "accumulation_steps": 1}


def fresh(growth: str) -> PeftModel:
    return adapt(growth=growth, density=0.3, total_steps=20, initial_regrow_rate=0.6, **TIMES)


def before_the_close(growth: str) -> tuple[PeftModel, torch.optim.Optimizer]:
    """A model whose next optimizer step closes a cycle, with the gradients of that step."""
    model = fresh(growth)
    optimizer = adamw(model)
    train(model, optimizer, CLOSE - 1)
    loss_of(model, CLOSE).backward()
    return model, optimizer


@pytest.fixture
def interrupted_close(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, type[BaseException]], Failing]:
    """Interrupts the first call of a close at the n-th operation in it."""

    def arrange(number: int, error: type[BaseException]) -> Failing:
        mode = Failing(number, error=error)
        finish = engine._Close.finish
        calls = []

        def interrupted(close: Any) -> None:
            calls.append(close)
            if len(calls) > 1:
                return finish(close)
            with mode:
                return finish(close)

        monkeypatch.setattr(engine._Close, "finish", interrupted)
        return mode

    return arrange


def operations(growth: str, arrange: Callable[..., Failing]) -> int:
    model, optimizer = before_the_close(growth)
    mode = arrange(-1, RuntimeError)
    optimizer.step()
    assert log_of(model)[-1].step == CLOSE and log_of(model)[-1].replaced > 0
    return mode.count


@pytest.mark.parametrize(("growth", "every"), [("accumulated_gradient", 1), ("momentum", 5)])
def test_a_close_interrupted_at_any_operation_is_finished_by_the_next_use(
    growth: str, every: int, interrupted_close: Callable[..., Failing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that catches the exception and goes on ends where the run without it ends, bit for bit."""
    with monkeypatch.context():
        count = operations(growth, interrupted_close)
    assert count > 100
    monkeypatch.undo()
    expected = fresh(growth)
    train(expected, adamw(expected), STEPS)
    for number in range(0, count, every):
        error = [RuntimeError, KeyboardInterrupt][number % 2]
        model, optimizer = before_the_close(growth)
        interrupted_close(number, error)
        with pytest.raises(error, match=f"operation {number} fails"):
            optimizer.step()
        monkeypatch.undo()
        optimizer.zero_grad()
        train(model, optimizer, STEPS - CLOSE, first=CLOSE + 1)
        assert_same_run(model, expected)
        assert len(log_of(model)) == len(log_of(expected))


def test_what_is_read_after_an_interrupted_close_is_the_finished_one(
    interrupted_close: Callable[..., Failing], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Forward passes, files, state dicts and copies."""
    growth = "accumulated_gradient"
    count = operations(growth, interrupted_close)
    monkeypatch.undo()
    expected, optimizer = before_the_close(growth)
    optimizer.step()
    expected.save_pretrained(tmp_path / "expected")
    reads: dict[str, Callable[[PeftModel], Any]] = {
        "forward": lambda model: loss_of(model, 0),
        "state_dict": lambda model: {k: v.clone() for k, v in model.state_dict().items()},
        "copy": lambda model: copy.deepcopy(model).state_dict(),
        "merge": lambda model: model.merge_and_unload().state_dict(),
        "file": lambda model: _file(model, tmp_path / "other"),
    }
    for number in range(count // 2, count, max(1, count // 16)):
        for name, read in reads.items():
            model, optimizer = before_the_close(growth)
            interrupted_close(number, RuntimeError)
            with suppress(RuntimeError):
                optimizer.step()
            monkeypatch.undo()
            found, wanted = read(model), read(copy.deepcopy(expected))
            if isinstance(found, dict):
                assert found.keys() == wanted.keys()
                assert all(torch.equal(found[key], wanted[key]) for key in found), (name, number)
            else:
                assert torch.equal(found, wanted), (name, number)
            for delta in deltas_of(model).values():
                assert_sound(delta, delta.k)


def _file(model: PeftModel, path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    model.save_pretrained(path)
    return load_file(path / "adapter_model.safetensors")


def test_a_refused_close_is_not_tried_again() -> None:
    """A criterion that proposes nonsense is refused once per close; nothing changes, and training goes on."""
    calls = []

    def propose(request: Any) -> torch.Tensor:
        calls.append(request)
        return torch.tensor([0, 0])

    with registered_criteria():
        register_growth_criterion("nonsense", propose)
        model = fresh("nonsense")
        optimizer = adamw(model)
        before = {name: delta.indices.clone() for name, delta in deltas_of(model).items()}
        for step in range(1, STEPS + 1):
            loss_of(model, step).backward()
            if step % 2:
                with pytest.raises(ValueError, match="distinct positions"):
                    optimizer.step()
            else:
                optimizer.step()
            optimizer.zero_grad()
        assert len(calls) == 3 and log_of(model) == []
        assert all(torch.equal(delta.indices, before[name]) for name, delta in deltas_of(model).items())
