"""What trainers do around and inside an optimizer's step: schedules, clipping, loss scaling, closures, nesting."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from typing import Any

import pytest
import torch
from cycle.helpers import adapt, assert_same_run, assert_sound, deltas_of, indices_of, log_of, loss_of, train, trainable
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from optimizers.catalogue import EVERY, SHARED, TwoIterates
from spiel_peft import SM3, SpIELOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
STEPS = 7
GROWTHS = ["accumulated_gradient", "momentum"]


def fresh(growth: str = "accumulated_gradient", **fields: Any) -> PeftModel:
    settings = {"accumulation_steps": 3, "density": 0.3, "total_steps": 20, "initial_regrow_rate": 0.8}
    return adapt(growth=growth, **{**settings, **fields})


def plain_run(name: str, growth: str = "accumulated_gradient") -> PeftModel:
    model = fresh(growth)
    train(model, {**EVERY, **SHARED}[name](trainable(model)), STEPS)
    assert [report.step for report in log_of(model)] == [3, 7]
    assert log_of(model)[1].replaced > 0
    return model


# Clipping


@pytest.mark.parametrize("growth", GROWTHS)
def test_candidates_do_not_change_the_gradient_norm(growth: str) -> None:
    """The trainer clips by the norm of the active deltas, whether a window is open or not."""
    norms = []
    for each in (growth, "none"):
        model = fresh(each)
        optimizer = EVERY["adamw"](trainable(model))
        norms.append([])
        for number in (1, 2, 3):
            loss_of(model, number).backward()
            norms[-1].append(float(nn.utils.clip_grad_norm_(trainable(model), 0.05)))
            optimizer.step()
            optimizer.zero_grad()
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert min(norms[0]) > 0.05


# Learning rates


@pytest.mark.parametrize(
    "name", ["adamw", "sgd-momentum", "adagrad", "adafactor", "transformers-adafactor", "bnb-lion"]
)
@pytest.mark.parametrize("kind", ["one-cycle", "cosine"])
def test_schedules(name: str, kind: str) -> None:
    """OneCycleLR changes momentum or beta1 as well; what the optimizer uses at the close counts."""

    def made(optimizer: torch.optim.Optimizer) -> LRScheduler:
        if kind == "cosine":
            return CosineAnnealingLR(optimizer, T_max=40)
        momentum = name in ("adamw", "sgd-momentum")
        return OneCycleLR(optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=60, cycle_momentum=momentum)

    model = adapt(total_steps=60, density=0.4)
    optimizer = EVERY[name](trainable(model))
    schedule = made(optimizer)
    before, sizes = loss_of(model, 1).item(), {n: d.k for n, d in deltas_of(model).items()}
    for _ in range(40):
        train(model, optimizer, 1, first=1, after=lambda number: schedule.step())
    # Adafactor's steps are short: they are a share of the deltas' own size.
    assert loss_of(model, 1).item() < before * (1.0 if name == "adafactor" else 0.95)
    for module, delta in deltas_of(model).items():
        assert_sound(delta, sizes[module])
    assert len(log_of(model)) == 10


def test_an_optimizer_that_sets_its_own_rate() -> None:
    """Its group says lr=None; without a known length the rate of regrowth stays the initial one."""
    model = adapt()
    optimizer = EVERY["transformers-adafactor-own-lr"](trainable(model))
    assert optimizer.param_groups[0]["lr"] is None
    train(model, optimizer, STEPS)
    assert [report.rate for report in log_of(model)] == [1.0, 0.2]


# Loss scaling


@pytest.mark.parametrize(
    "name",
    [
        "adamw",
        "adamw-fused",
        "sgd-fused",
        "sgd-nesterov",
        "adagrad",
        "rprop",
        "transformers-adafactor",
        "bnb-adamw",
        "sm3",
    ],
)
@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("wrap", [False, True])
def test_an_overflow_inside_a_window_leaves_no_trace(name: str, growth: str, wrap: bool) -> None:
    """float16's GradScaler skips the steps before the 1st, 2nd and 6th; all three are in windows."""
    # torch's fused SGD leaves its momentum uninitialized if its very first step is skipped.
    bad_before = (2, 6) if name == "sgd-fused" else (1, 2, 6)
    model = fresh(growth)
    base = {**EVERY, **SHARED}[name](trainable(model))
    optimizer = SpIELOptimizer(base, model) if wrap else base
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for number in range(1, STEPS + 1):
        for overflow in (True, False) if number in bad_before else (False,):
            loss = loss_of(model, 50 if overflow else number)
            scaler.scale(loss * float("inf") if overflow else loss).backward()
            if number % 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert_same_run(model, plain_run(name, growth))


# Closures


@pytest.mark.parametrize(
    "name", ["adamw", "adamw-fused", "sgd-nesterov", "two-iterates", "adafactor", "bnb-adamw", "sm3"]
)
@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("keyword", [False, True])
def test_closures(name: str, growth: str, keyword: bool) -> None:
    model = fresh(growth)
    optimizer = {**EVERY, **SHARED}[name](trainable(model))
    losses = []
    for number in range(1, STEPS + 1):

        def closure(number: int = number) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            losses.append(loss.item())
            return loss

        optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert len(losses) == STEPS
    assert_same_run(model, plain_run(name, growth))


def test_clipping_inside_a_closure_reaches_the_candidates() -> None:
    """As Lightning does it. The optimizer writes into the gradient, so only the closure's end tells the factor."""
    model, reference = fresh(), fresh()
    optimizer, other = EVERY["sgd-nesterov"](trainable(model)), EVERY["sgd-nesterov"](trainable(reference))
    for number in (1, 2):

        def closure(number: int = number) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, number)
            (loss * 8).backward()
            for p in trainable(model):
                p.grad /= 8
            nn.utils.clip_grad_norm_(trainable(model), 0.05)
            return loss

        optimizer.step(closure)
        loss_of(reference, number).backward()
        nn.utils.clip_grad_norm_(trainable(reference), 0.05)
        other.step()
        other.zero_grad()
    for ours, theirs in zip(deltas_of(model).values(), deltas_of(reference).values(), strict=True):
        assert torch.equal(ours.state.window.positions, theirs.state.window.positions)
        torch.testing.assert_close(ours.state.window.sums, theirs.state.window.sums)


# Optimizers inside optimizers


@torch.no_grad()
def look_ahead(optimizer: Any) -> None:
    """Parameters and where they were before meet halfway."""
    optimizer.inner.step()
    for group in optimizer.param_groups:
        for p in group["params"]:
            slow = optimizer.state[p].setdefault("slow", torch.zeros_like(p))
            slow.lerp_(p, 0.5)
            p.copy_(slow)


class Lookahead(torch.optim.Optimizer):
    """Shares the groups of the one inside."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self, closure: Any = None) -> None:
        look_ahead(self)


class WithoutHooks(torch.optim.Optimizer):
    """The same without its base class's constructor, which brings the hooks."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.defaults = inner, inner.param_groups, {}
        self.state = defaultdict(dict)

    def step(self, closure: Any = None) -> None:
        look_ahead(self)


class HooksOfSteps(torch.optim.Optimizer):
    """The same with the hooks of steps alone and groups that are looked up, as pytorch_optimizer's wrappers do it."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.defaults = inner, {}
        self.state = defaultdict(dict)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._patch_step_function()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def step(self, closure: Any = None) -> None:
        look_ahead(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        kept = [self.state[p] for group in self.param_groups for p in group["params"]]
        return {"slow": kept, "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict["inner"])
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.state |= dict(zip(parameters, state_dict["slow"], strict=True))


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimization: the gradient at a point uphill steps from where the parameters were."""

    def __init__(self, inner: torch.optim.Optimizer, rho: float = 0.05) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {"rho": rho})
        self.inner, self.param_groups = inner, inner.param_groups
        self.rho = rho

    @torch.no_grad()
    def step(self, closure: Any) -> None:
        with torch.enable_grad():
            closure()
        moved = []
        for group in self.param_groups:
            for p in group["params"]:
                uphill = p.grad * (self.rho / (p.grad.norm() + 1e-12))
                p.add_(uphill)
                moved.append((p, uphill))
        with torch.enable_grad():
            closure()
        for p, uphill in moved:
            p.sub_(uphill)
        self.inner.step()


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, SM3])
@pytest.mark.parametrize("outer", [Lookahead, WithoutHooks, HooksOfSteps])
def test_a_step_inside_a_step_counts_once(growth: str, kind: type[Any], outer: type[Any]) -> None:
    model = fresh(growth)
    inner = kind(trainable(model), lr=0.02)
    optimizer = outer(inner)
    seen = []
    for number in range(1, STEPS + 1):
        before = indices_of(model)
        states = {m: by_position(inner, optimizer, d) for m, d in deltas_of(model).items()}
        loss_of(model, number).backward()
        optimizer.step()
        inner.zero_grad()
        seen.append(any(not torch.equal(before[m], d.indices) for m, d in deltas_of(model).items()))
        for module, delta in deltas_of(model).items():
            assert delta.state.step == number
            now = by_position(inner, optimizer, delta)
            for position, slow in now["slow"].items():
                if position not in before[module].tolist():
                    assert slow == 0.0
                elif number > 1:
                    # Halfway from where it was, to where the values are now.
                    value = float(delta.values[delta.indices.tolist().index(position)])
                    assert slow == pytest.approx(value, abs=1e-7) or states[module]["slow"][position] == slow
    assert [report.step for report in log_of(model)] == [3, 7]
    assert [number for number, moved in enumerate(seen, 1) if moved] == [3, 7]
    if growth == "momentum":
        assert_accumulated_once(kind)


def by_position(inner: Any, outer: Any, delta: Any) -> dict[str, dict[int, float]]:
    slow = outer.state.get(delta.values, {}).get("slow", torch.zeros_like(delta.values))
    return {"slow": dict(zip(delta.indices.tolist(), slow.tolist(), strict=True))}


def assert_accumulated_once(kind: type[Any]) -> None:
    """The same first step without the wrapper: the same accumulators."""
    rows = []
    for wrap in (True, False):
        model = fresh("momentum")
        inner = kind(trainable(model), lr=0.02)
        train(model, Lookahead(inner) if wrap else inner, 1)
        rows.append([delta.state.row for delta in deltas_of(model).values()])
    for a, b in zip(*rows, strict=True):
        assert a.any()
        assert torch.equal(a, b)


@pytest.mark.parametrize("growth", GROWTHS)
def test_sharpness_aware_minimization(growth: str) -> None:
    """Two evaluations of the closure and a step inside are one step of training."""
    model = fresh(growth, total_steps=60)
    optimizer = Sharpness(torch.optim.AdamW(trainable(model), lr=0.02))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 1)
        loss.backward()
        return loss

    before = loss_of(model, 1).item()
    for _ in range(20):
        optimizer.step(closure)
    assert loss_of(model, 1).item() < 0.9 * before
    assert [report.step for report in log_of(model)] == [3, 7, 11, 15, 19]
    for delta in deltas_of(model).values():
        assert delta.state.step == 20
        assert (optimizer.inner.state[delta.values]["exp_avg_sq"] > 0).all()


class Twice(torch.optim.SGD):
    """Evaluates its closure twice and steps by what it found last."""

    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            closure()
            closure()
        super().step()


def test_a_closure_evaluated_twice_is_accumulated_once() -> None:
    rows = []
    for kind in (Twice, torch.optim.SGD):
        model = fresh("momentum")
        optimizer = kind(trainable(model), lr=0.1)

        def closure(model: PeftModel = model) -> Tensor:
            model.zero_grad()
            loss = loss_of(model, 1)
            loss.backward()
            return loss

        optimizer.step(closure)
        rows.append([delta.state.row for delta in deltas_of(model).values()])
    for a, b in zip(*rows, strict=True):
        assert a.any()
        assert torch.equal(a, b)


class OnTop(torch.optim.AdamW):
    """Calls the step of its base class, which has hooks of its own, and does something before and after."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.999)
        return loss


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("by_closure", [False, True])
def test_a_subclass_that_calls_its_base_class_counts_once(growth: str, by_closure: bool) -> None:
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # hooks come with a class's first instance
    model = fresh(growth)
    optimizer = OnTop(trainable(model), lr=0.02)
    for number in range(1, STEPS + 1):

        def closure(number: int = number) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            return loss

        if by_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    assert [report.step for report in log_of(model)] == [3, 7]
    for delta in deltas_of(model).values():
        assert delta.state.step == STEPS == int(optimizer.state[delta.values]["step"])


class Stubborn(torch.optim.AdamW):
    """Tries its base class's step again if that fails."""

    failures = 1

    def step(self, closure: Any = None) -> Any:
        for attempt in range(2):
            try:
                return super().step(closure)
            except RuntimeError:
                assert attempt == 0

    def _init_group(self, *args: Any, **kwargs: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("not yet")
        return super()._init_group(*args, **kwargs)


def test_a_step_tried_twice_counts_once() -> None:
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # hooks come with a class's first instance
    model = fresh()
    optimizer = Stubborn(trainable(model), lr=0.02)
    for number in range(1, STEPS + 1):
        optimizer.failures = 1
        loss_of(model, number).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not optimizer.failures
    assert_same_run(model, plain_run("adamw"))


class Several(torch.optim.Optimizer):
    """Hands some parameters to one optimizer and the rest to another; keeps nothing itself."""

    def __init__(self, *inner: torch.optim.Optimizer) -> None:
        super().__init__([p for each in inner for group in each.param_groups for p in group["params"]], {})
        self.inner = list(inner)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for each in self.inner:
            each.step()


@pytest.mark.parametrize("deltas_first", [True, False])
def test_an_optimizer_for_deltas_and_one_for_the_rest(deltas_first: bool) -> None:
    """Only one of the two holds deltas; it has the state that follows them."""
    model = fresh(bias="all")
    values = [delta.values for delta in deltas_of(model).values()]
    rest = [p for p in trainable(model) if not any(p is value for value in values)]
    parts = [torch.optim.AdamW(values, lr=0.02), torch.optim.SGD(rest, lr=0.1)]
    train(model, Several(*parts if deltas_first else parts[::-1]), STEPS)
    reference = fresh(bias="all")
    values = [delta.values for delta in deltas_of(reference).values()]
    rest = [p for p in trainable(reference) if not any(p is value for value in values)]
    optimizers = [torch.optim.AdamW(values, lr=0.02), torch.optim.SGD(rest, lr=0.1)]
    for number in range(1, STEPS + 1):
        loss_of(reference, number).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert log_of(model)[1].replaced > 0
    assert_same_run(model, reference)


class SharedState(Sharpness):
    """The same with one state for both, as its usual implementations have it."""

    def __init__(self, inner: torch.optim.Optimizer, rho: float = 0.05) -> None:
        super().__init__(inner, rho)
        self.state = inner.state


@pytest.mark.parametrize("outer", [Sharpness, SharedState])
@pytest.mark.parametrize("name", ["adamw", "somebodys-lion"])
def test_state_that_two_optimizers_share_moves_once(outer: type[Any], name: str) -> None:
    """No distance uphill: the run of the optimizer inside, whose rules hold."""
    model = fresh()
    optimizer = outer(EVERY[name](trainable(model)), rho=0.0)
    for number in range(1, STEPS + 1):

        def closure(number: int = number) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            return loss

        optimizer.step(closure)
    reference, inner = fresh(), optimizer.inner
    expected = EVERY[name](trainable(reference))
    train(reference, expected, STEPS)
    assert log_of(reference)[1].replaced > 0
    assert_same_run(model, reference)
    for ours, theirs in zip(deltas_of(model).values(), deltas_of(reference).values(), strict=True):
        assert torch.equal(inner.state[ours.values]["exp_avg"], expected.state[theirs.values]["exp_avg"])


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("stop", [1, 3, 4, 5, 6])
def test_resuming_by_a_state_dict_with_another_inside(wrap: bool, stop: int) -> None:
    """Training state travels in that of the optimizer inside; stopped in windows, at a close and between."""
    runs = []
    for end in (STEPS, stop):
        model = fresh()
        optimizer = HooksOfSteps(torch.optim.AdamW(trainable(model), lr=0.02))
        train(model, SpIELOptimizer(optimizer, model) if wrap else optimizer, end)
        runs.append((model, optimizer))
    (whole, _), (model, optimizer) = runs
    again = fresh()
    resumed = HooksOfSteps(torch.optim.AdamW(trainable(again), lr=0.02))
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(again, SpIELOptimizer(resumed, again) if wrap else resumed, STEPS - stop, first=stop + 1)
    assert log_of(whole)[1].replaced > 0
    assert_same_run(again, whole)


def test_a_step_that_fails_is_over() -> None:
    """The next one, of another optimizer, is a step of its own."""

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("out of luck")

    model = fresh()
    loss_of(model, 1).backward()
    failing = Failing(trainable(model), lr=0.1)
    with pytest.raises(RuntimeError, match="out of luck"):
        failing.step()
    model.zero_grad()
    train(model, EVERY["adamw"](trainable(model)), STEPS)
    assert_same_run(model, plain_run("adamw"))


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("name", ["adamw", "sgd-momentum", "bnb-adamw"])
def test_one_optimizer_per_parameter_inside_the_backward_pass(name: str, growth: str) -> None:
    """Each steps as soon as its gradient is there, to save the memory of gradients: the same run."""
    model = fresh(growth)
    optimizers = {p: EVERY[name]([p]) for p in trainable(model)}

    def step(p: nn.Parameter) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)
    for number in range(1, STEPS + 1):
        loss_of(model, number).backward()
    assert_same_run(model, plain_run(name, growth))


def test_switching_between_two_iterates_keeps_both_in_place() -> None:
    """Schedule-Free's evaluation mode mixes its iterates: they must be of the same positions."""
    model = fresh()
    optimizer = TwoIterates(trainable(model))
    for number in range(1, STEPS + 1):
        loss_of(model, number).backward()
        optimizer.step()
        optimizer.zero_grad()
        for delta in deltas_of(model).values():
            z = optimizer.state[delta.values]["z"]
            if number in (3, 7):
                # What has just come is zero in both.
                assert ((delta.values == 0) == (z == 0)).all()
