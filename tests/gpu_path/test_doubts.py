"""What a GPU's path does where the host learns late that a search found nothing or was misled."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from peft import get_peft_model
from support.adapters import deltas_of, indices_of
from support.runs import adamw, adapt, assert_same_run, loss_of, train
from torch import Tensor, nn

from spiel_kernels.dispatch import use_backend
from spiel_kernels.triton_backend import select
from spiel_peft import SpIELConfig

STEPS = 7  # windows of two steps; closes after steps 2 and 6


def trained(backend: str, batches: int = 1, **fields: Any) -> nn.Module:
    with use_backend(backend):
        model = adapt(**fields)
        optimizer = adamw(model)
        for number in range(1, STEPS + 1):
            for micro in range(batches):
                loss_of(model, 10 * number + micro).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


@pytest.mark.parametrize("fields", [{}, {"growth": "momentum"}, {"growth": "random"}], ids=["ag", "ma", "random"])
@pytest.mark.parametrize("batches", [1, 3])
def test_the_path_of_a_gpu_moves_what_the_path_of_a_cpu_moves(fields: dict[str, Any], batches: int) -> None:
    expected, got = trained("torch", batches, **fields), trained("triton", batches, **fields)
    for name, indices in indices_of(expected).items():
        assert torch.equal(indices_of(got)[name], indices), name
    for name, delta in deltas_of(expected).items():
        torch.testing.assert_close(deltas_of(got)[name].values, delta.values, rtol=1e-4, atol=1e-5)


def misled(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    positions, values, found = REAL(*args)
    return positions.flip(0).sort().values * 0, values, found * torch.tensor([1, 0])


REAL = select.largest_outer


def test_a_window_that_a_sample_has_misled_is_opened_by_the_next_step() -> None:
    with use_backend("triton"), mock.patch.object(select, "largest_outer", misled):
        model = adapt(accumulation_steps=2, regrow_every=4)
        optimizer = adamw(model)
        train(model, optimizer, 1)
        for delta in deltas_of(model).values():
            assert delta.state.window is None and delta.state.misled
    with use_backend("triton"):
        loss_of(model, 2).backward()
        windows = {name: delta.state.window for name, delta in deltas_of(model).items()}
        assert all(window is not None and window.positions.unique().numel() > 1 for window in windows.values())
        optimizer.step()
    assert all(not delta.state.misled and delta.state.closes == 1 for delta in deltas_of(model).values())


@pytest.mark.parametrize("quiet", [0, 1], ids=["first", "second"])
def test_a_micro_batch_without_gradient_leaves_the_choice_to_the_next(quiet: int) -> None:
    def run(backend: str) -> nn.Module:
        with use_backend(backend):
            model = adapt()
            optimizer = adamw(model)
            for number in range(1, STEPS + 1):
                for micro in range(2):
                    (loss_of(model, 10 * number + micro) * (0.0 if micro == quiet else 1.0)).backward()
                optimizer.step()
                optimizer.zero_grad()
        return model

    expected, got = run("torch"), run("triton")
    for name, indices in indices_of(expected).items():
        assert torch.equal(indices_of(got)[name], indices), name


def test_gradients_that_were_zeroed_in_place_do_not_count() -> None:
    def run(spoilt: bool) -> nn.Module:
        with use_backend("triton"):
            model = adapt()
            optimizer = adamw(model)
            for number in range(1, STEPS + 1):
                # Both see the same first gradient, which chooses the candidates.
                loss_of(model, number).backward()
                if spoilt:
                    optimizer.zero_grad(set_to_none=False)
                    loss_of(model, number).backward()
                optimizer.step()
                optimizer.zero_grad()
        return model

    expected, got = run(False), run(True)
    for name, delta in deltas_of(expected).items():
        assert torch.equal(deltas_of(got)[name].indices, delta.indices), name
        # The search for candidates and a gather round otherwise.
        torch.testing.assert_close(deltas_of(got)[name].values, delta.values, rtol=1e-4, atol=1e-6)


def test_a_counter_of_operations_changes_nothing() -> None:
    """Under a dispatch mode PyTorch's foreach operations do not raise versions, by which plans are remembered."""
    from gpu_path.counting import counting

    expected = trained("triton")
    with counting():
        got = trained("triton")
    assert_same_run(expected, got)


def test_layers_that_share_an_input_share_its_copy() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(40, 30, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x) + self.c(x * 2)

    from gpu_path.counting import counting

    config = SpIELConfig(target_modules=["a", "b", "c"], num_deltas=60)
    with use_backend("triton"), mock.patch("spiel_kernels.outer_plan.choose_method", lambda *_: "entries"):
        model = get_peft_model(Twins(), config).train()
        inner = torch.randn(8, 40, requires_grad=True)
        with counting() as counts:
            model(inner.tanh()).square().sum().backward()
    # Three output gradients, and two inputs instead of three.
    assert counts.launches["token_major_kernel"] == 5
    assert counts.launches["entry_dots_kernel"] == 3
