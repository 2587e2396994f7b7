"""Base weights are unchanged after a pass that a signal ends at a random moment, or an exception at any operation."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.layers import Single, transposed
from support.quantized import COLS, QUANTIZED
from support.tensors import Failing, assert_same_bits
from torch import Tensor, nn
from torch.nn.utils._named_member_accessor import NamedMemberAccessor
from torch.utils.checkpoint import checkpoint

from spiel_peft import SpIELConfig


class Experts(nn.Module):
    """A module that computes with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 12))
        self.down = nn.Parameter(torch.randn(3, 12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(x @ self.up[i]).tanh() @ self.down[i] for i in range(3)]).sum(0)


class Network(nn.Module):
    """A network with every kind of layer that is folded in place, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 8)
        self.turned = transposed(8, 8)
        self.experts = Experts()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2).tanh()
        return self.experts(self.turned(self.linear(x).tanh()))


IDS = torch.arange(24).view(2, 12) % 20
TARGETS: dict[str, Any] = {
    "target_modules": ["embed", "conv", "linear", "turned"],
    "target_parameters": ["experts.up", "experts.down"],
}


def network(dtype: torch.dtype = torch.float32, adapters: int = 1, **config: Any) -> PeftModel:
    """An adapted network, in training mode; all adapters are active."""
    torch.manual_seed(0)
    settings = {"density": 0.3, "init_weights": False, **TARGETS, **config}
    model = get_peft_model(Network().to(dtype), SpIELConfig(**settings), adapter_name="a0").train()
    for number in range(1, adapters):
        model.add_adapter(f"a{number}", SpIELConfig(**{**settings, "seed": number}))
    model.base_model.set_adapter([f"a{number}" for number in range(adapters)])
    return model


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all base weights as they are in memory; reading them does not undo interrupted operations."""
    return {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if "spiel_delta" not in name
    }


def assert_untouched(model: nn.Module, originals: dict[str, Tensor]) -> None:
    for name, tensor in stored(model).items():
        assert_same_bits(tensor, originals[name], name)


def passes(model: nn.Module, x: Tensor) -> list[Tensor]:
    """A forward and a backward pass: the output and the gradients of all values."""
    model.zero_grad()
    out = model(x)
    out.float().square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def checkpointed(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = checkpoint(model, x, use_reentrant=False)
    out.float().square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def evaluation(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [model(x)]


def dpo_step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The order of calls of TRL's DPO: the reference between the policy's forward pass and its backward pass."""
    model.zero_grad()
    policy = model(x)
    with torch.no_grad(), model.disable_adapter():
        reference = model(x)
    (policy - reference).float().square().sum().backward()
    return [policy.detach(), reference, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(one, other, f"result {number}")


# An exception at every operation


PASSES: dict[str, Callable[[nn.Module, Tensor], list[Tensor]]] = {
    "training": passes,
    "checkpointed": checkpointed,
    "evaluation": evaluation,
    "dpo": dpo_step,
}
VARIANTS: dict[str, Callable[[], PeftModel]] = {
    "one-adapter": network,
    "two-adapters": lambda: network(adapters=2),
    "bf16": lambda: network(torch.bfloat16),
    "window": lambda: network(growth="accumulated_gradient", regrow_every=4, accumulation_steps=2),
}


def count_operations(run: Callable[[nn.Module, Tensor], list[Tensor]], model: nn.Module, x: Tensor) -> int:
    with Failing(-1) as counting:
        run(model, x)
    return counting.count


RUNS = [*((order, "one-adapter") for order in PASSES), *(("training", variant) for variant in [*VARIANTS][1:])]


@pytest.mark.parametrize("order, variant", [RUNS[0], *(pytest.param(*run, marks=pytest.mark.slow) for run in RUNS[1:])])
def test_an_exception_at_any_operation_leaves_base_weights_alone(order: str, variant: str) -> None:
    """Any operation may raise, as when memory runs out, also one that puts the originals back."""
    run, model = PASSES[order], VARIANTS[variant]()
    originals, expected = stored(model), run(model, IDS)
    operations = count_operations(run, model, IDS)
    assert operations > 50
    for number in range(operations):
        with pytest.raises(RuntimeError, match=f"operation {number} fails"), Failing(number):
            run(model, IDS)
        assert_untouched(model, originals)
    if variant != "window":  # a pass may open or fill one
        assert_equal(run(model, IDS), expected)


@pytest.mark.parametrize("kind", ["nf4-double", "8bit"])
def test_an_exception_at_any_operation_of_a_quantized_layer(kind: str) -> None:
    torch.manual_seed(0)
    config = SpIELConfig(num_deltas=60, init_weights=False, target_modules=["layer"], growth="none")
    model = get_peft_model(Single(QUANTIZED[kind]()), config).train()
    x = torch.randn(3, COLS, requires_grad=True)
    passes(model, x)  # 8-bit layers move their scales in the first one
    originals, expected = stored(model), passes(model, x)
    for number in range(count_operations(passes, model, x)):
        with pytest.raises(RuntimeError, match=f"operation {number} fails"), Failing(number):
            passes(model, x)
        assert_untouched(model, originals)
        assert_equal(passes(model, x), expected)


@pytest.mark.slow
def test_when_putting_back_fails_as_well_the_next_use_does_it() -> None:
    """After the first failure all operations fail, so that originals can be put back only after the pass."""
    model = network()
    originals, expected = stored(model), passes(model, IDS)
    operations, left = count_operations(passes, model, IDS), 0
    for number in range(operations):
        with pytest.raises(RuntimeError), Failing(number, on=True):
            passes(model, IDS)
        left += any(not torch.equal(tensor, originals[name]) for name, tensor in stored(model).items())
        model.train()
        assert_untouched(model, originals)
    assert left > 5
    assert_equal(passes(model, IDS), expected)


# Signals


def watched(work: Callable[[], Any]) -> None:
    """Run `work`, which signals may interrupt; a signal at any other place is ignored, so that none escapes a test."""
    work()


@contextmanager
def alarms() -> Iterator[None]:
    """SIGALRM raises KeyboardInterrupt inside of `watched`, as Ctrl-C does."""

    def interrupt(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code is watched.__code__:
                raise KeyboardInterrupt
            frame = frame.f_back

    # What is raised in a destructor is only reported. A signal may interrupt pytest's report as well, which fails the
    # test; this report is not written in Python.
    report, sys.unraisablehook = sys.unraisablehook, deque(maxlen=0).append
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.unraisablehook = report


def interrupted(work: Callable[[], Any], after: float, again: float = 0.0) -> bool:
    """Run `work` and interrupt it after so many seconds, and then every `again` seconds; whether that came in time."""
    came = False
    signal.setitimer(signal.ITIMER_REAL, after, again)
    try:
        watched(work)
    except KeyboardInterrupt:
        came = True
    signal.setitimer(signal.ITIMER_REAL, 0)
    # PyTorch's `no_grad` leaves gradients off if it is interrupted on its way out.
    torch.set_grad_enabled(True)
    # Nor can a context manager of PyTorch's undo what it has done if the signal arrives before its body begins.
    while torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
    return came


def interrupt_often(
    work: Callable[[], Any], hits: int, seed: str, after_each: Callable[[], None], **how: float
) -> None:
    """Interrupt `work` so many times at random moments, drawn from the seed."""
    moments, shortest = random.Random(seed), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        work()
        shortest = min(shortest, time.perf_counter() - start)
    with alarms():
        for _ in range(20 * hits):
            hits -= interrupted(work, moments.uniform(0.01, 1.1) * shortest, **how)
            after_each()
            if not hits:
                return
    raise AssertionError("the signals came too late")


@pytest.mark.parametrize("order", PASSES)
@pytest.mark.parametrize("variant", ["one-adapter", "two-adapters", "bf16"])
def test_ctrl_c_at_a_random_moment_leaves_base_weights_alone(variant: str, order: str) -> None:
    run, model = PASSES[order], VARIANTS[variant]()
    originals, expected, active = stored(model), run(model, IDS), list(model.base_model.active_adapters)

    def check() -> None:
        assert_untouched(model, originals)
        # PEFT's `disable_adapter` leaves them disabled if it is interrupted itself.
        model.base_model.enable_adapter_layers()
        model.base_model.set_adapter(active)

    interrupt_often(lambda: run(model, IDS), 40, f"{variant} {order}", check)
    assert_equal(run(model, IDS), expected)


@pytest.mark.parametrize("size", [8, 128])
def test_ctrl_c_at_hundreds_of_moments_of_one_layer(size: int) -> None:
    torch.manual_seed(0)
    config = SpIELConfig(density=0.2, init_weights=False, target_modules=["layer"], growth="none")
    model = get_peft_model(Single(nn.Linear(size, size)), config).train()
    x = torch.randn(4, size, requires_grad=True)
    originals, expected = stored(model), passes(model, x)
    interrupt_often(lambda: passes(model, x), 400, str(size), lambda: assert_untouched(model, originals))
    assert_equal(passes(model, x), expected)


def test_many_interrupts_in_a_row_are_undone_by_the_next_use() -> None:
    model = network()
    originals, expected = stored(model), passes(model, IDS)

    def check() -> None:
        model.eval().train()
        assert_untouched(model, originals)

    interrupt_often(lambda: passes(model, IDS), 100, "many", check, again=2e-4)
    assert_equal(passes(model, IDS), expected)


@pytest.mark.parametrize("restores", [0, 1])
def test_an_interrupt_while_a_module_gets_its_parameters_back(monkeypatch: pytest.MonkeyPatch, restores: int) -> None:
    """An interrupt while `functional_call` puts parameters back one by one leaves no copy in the module."""
    model = network()
    originals, expected = stored(model), passes(model, IDS)
    own = dict(model.named_parameters())
    swap = NamedMemberAccessor.swap_tensors_dict
    calls = []

    def interrupted_swap(self: Any, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        calls.append(tensors)
        if len(calls) == 2:  # the first call puts the copies in, the second one the parameters back
            swap(self, dict([*tensors.items()][:restores]), *args, **kwargs)
            raise KeyboardInterrupt
        return swap(self, tensors, *args, **kwargs)

    monkeypatch.setattr(NamedMemberAccessor, "swap_tensors_dict", interrupted_swap)
    with pytest.raises(KeyboardInterrupt):
        passes(model, IDS)
    monkeypatch.undo()
    assert_untouched(model, originals)
    assert all(parameter is own[name] for name, parameter in model.named_parameters())
    assert_equal(passes(model, IDS), expected)


def test_locks_are_free_after_an_interrupt() -> None:
    model = network()
    interrupt_often(lambda: passes(model, IDS), 50, "locks", lambda: None)
    done = threading.Event()

    def work() -> None:
        passes(model, IDS)
        done.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert done.wait(20)
    thread.join()
