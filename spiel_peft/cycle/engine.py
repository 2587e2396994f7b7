"""Runs the cycle before and after every optimizer step that touches sparse deltas (Ansell et al., 2024, section 3.2).

PyTorch's global optimizer step hooks call it, so no trainer has to know of it. It looks parameters up at every step,
as trainers and PEFT replace Parameter objects and group dicts between steps.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..call_stack import is_rehearsal
from ..checks import listed
from ..delta import LIVE_DELTAS, AdapterRun, SparseDelta
from ..growth import GrowthCriterion, get_growth_criterion
from ..state import StepGradient
from . import parallel, steps
from .agreement import SKIPPED, WITHOUT_GRADIENT, Ranks, agree_on_step, check_same, decide
from .close import CycleReport, closes_at, is_skipped, lr_following_rate, refuse_ruined, regrow_rate
from .exchange import Joined, Moves, joinable, look_up
from .grown_seeds import GrownSeeds
from .optimizer_buffers import check_optimizer, check_state, copy_all, counters, reseeded_states
from .parallel import note_step, ranks_of, refuse_mixed_groups
from .resume import carry
from .runs import begin_run, check_total_steps, join, owned_by_another, set_total_steps
from .steps import accumulate_after_step, any_nonzero, note_gradients, when_known, will_take_place
from .window import commit_windows, drop_step, narrow, ready_probes

logger = logging.getLogger(__name__)

_handles: list[Any] = []


def install() -> None:
    """Register the global step hooks; once per process however often it is called."""
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(before_step))
        _handles.append(register_optimizer_step_post_hook(after_step))
        parallel.install()


def held_deltas(optimizer: torch.optim.Optimizer, idle: bool = False) -> list[tuple[SparseDelta, dict[str, Any]]]:
    """The deltas whose values `optimizer` steps, each with its parameter group, ordered by adapter and module name.

    Args:
        optimizer: any. One that holds no deltas costs a look at each live delta and at each of its own parameters.
        idle: with deltas that can be trained and neither require a gradient nor have one now, as those of an adapter
            that is not the active one.
    """
    # `delta.values` is a lookup through `nn.Module.__getattr__`, ten times slower, in every step of every optimizer.
    live = {id(delta._parameters.get("values")): delta for delta in LIVE_DELTAS}
    if not live:
        return []
    held = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            delta = live.get(id(parameter))
            # `set_adapter` may have frozen an adapter between its backward pass and the step.
            if delta is not None and (
                parameter.requires_grad or parameter.grad is not None or (idle and not delta.run.config.inference_mode)
            ):
                held.append((delta, group))
    return sorted(held, key=lambda pair: (pair[0].run.adapter_name, pair[0].module_name))


def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """Begin a run where a delta sees its first step, and note the gradients that the step is given."""
    deltas = [delta for delta, _ in held_deltas(optimizer)]
    if not deltas or getattr(optimizer, "delegates_step", False):
        return None
    for run in {delta.run: None for delta in deltas}:
        run.settle()
    if is_rehearsal():
        carry(optimizer)
        return None
    if not steps.begin(optimizer, {id(delta.values) for delta in deltas}):
        return None
    refuse_mixed_groups(optimizer, deltas)
    check_optimizer(optimizer, deltas)
    join(optimizer, deltas)

    def note(first: bool) -> None:
        ready_probes(deltas)
        note_gradients(optimizer, deltas, first)

    return when_known(note, args, kwargs)


def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Take the finished step into account, and close the cycle of every adapter that is due.

    Raises:
        FloatingPointError: the step has made deltas NaN or infinite.
        ValueError, TypeError: a close is refused, by the growth criterion's answers or the optimizer's state.
    """
    if getattr(optimizer, "delegates_step", False) or is_rehearsal():
        return
    optimizers = steps.end(optimizer)
    if not optimizers:
        return
    parties: dict[tuple[int, Ranks | None], list[tuple[SparseDelta, dict[str, Any]]]] = {}
    held = held_deltas(optimizer)
    for delta, group in held:
        parties.setdefault((id(delta.run), ranks_of(delta)), []).append((delta, group))
    with torch.no_grad():
        for (_, ranks), held_together in parties.items():
            _after_step_of_run(optimizers, held_together, ranks)
    note_step([delta for delta, _ in held])


def _after_step_of_run(
    optimizers: list[torch.optim.Optimizer], held: list[tuple[SparseDelta, dict[str, Any]]], ranks: Ranks | None
) -> None:
    deltas = [delta for delta, _ in held]
    run = deltas[0].run
    outcome = _outcome(optimizers, deltas, ranks)
    if outcome == WITHOUT_GRADIENT:
        _note_step_without_gradient(run, deltas)
        return
    if outcome == SKIPPED:
        for delta in deltas:
            drop_step(delta)
            delta.state.unheld_steps = 0
        refuse_ruined(deltas)
        return
    commit_windows(deltas, ranks)
    for delta in deltas:
        accumulate_after_step(optimizers, delta)
    for delta, group in held:
        _count_step(delta, group)
    config = run.config
    due = [
        (delta, group)
        for delta, group in held
        if closes_at(delta.state.step, config.regrow_every, config.accumulation_steps)
    ]
    if due:
        _warn_of_deltas_without_gradient(run, [delta for delta, _ in due])
        criterion = get_growth_criterion(config.growth)
        if criterion.propose is not None:
            _close(optimizers, criterion, due, ranks)


def _outcome(optimizers: list[torch.optim.Optimizer], deltas: list[SparseDelta], ranks: Ranks | None) -> int:
    """Whether the step counts; one wait for the device, however many matrices and ranks there are."""
    grads = [delta.values.grad for delta in deltas if delta.values.grad is not None]
    if grads and all(delta.state.current.graph_task == -1 for delta in deltas):
        # No backward pass has reached the adapter since its last step. Zeros are what zero_grad(set_to_none=False)
        # leaves; anything else was put there by the training loop itself.
        grads = grads if any_nonzero(grads) else []
    if ranks is None:
        return int(will_take_place(optimizers, grads)) if grads else WITHOUT_GRADIENT
    own = will_take_place(optimizers, grads) if grads else torch.tensor(WITHOUT_GRADIENT)
    return agree_on_step(ranks, deltas, own)


def _count_step(delta: SparseDelta, group: dict[str, Any]) -> None:
    state = delta.state
    state.reached = state.reached or delta.values.grad is not None
    state.current = StepGradient()
    state.step += 1
    state.total_steps = delta.run.total_steps or 0
    state.max_lr = max(state.max_lr, _learning_rate(group))
    state.unheld_steps = 0
    if delta.untouched:  # assigning to a module is slow, and this is every step
        delta.untouched = False


def _learning_rate(group: dict[str, Any]) -> float:
    # Some optimizers set their own and leave this None.
    return float(group.get("lr") or 0.0)


def _note_step_without_gradient(run: AdapterRun, deltas: list[SparseDelta]) -> None:
    """Warn where a whole cycle of steps has gone by and no delta of the adapter has had a gradient yet."""
    run.record.steps_without_gradient += 1
    if run.record.steps_without_gradient == run.config.regrow_every + run.config.accumulation_steps:
        _warn_of_deltas_without_gradient(run, deltas)


def _warn_of_deltas_without_gradient(run: AdapterRun, deltas: list[SparseDelta]) -> None:
    if run.record.warned_unreached:
        return
    run.record.warned_unreached = True
    names = [delta.module_name for delta in deltas if not delta.state.reached]
    if names:
        warnings.warn(
            f"Adapter {run.adapter_name!r}: {len(names)} of {len(deltas)} modules have had no gradient since the run "
            f"began, so their deltas stay zero: {listed(names)}. Either the model does not call these modules for "
            "this data, or it reads their weights past their forward pass (as Mamba's fused kernels do), where an "
            "adapter has no effect. Leave them out of target_modules.",
            stacklevel=2,
        )


def _close(
    optimizers: list[torch.optim.Optimizer],
    criterion: GrowthCriterion,
    due: list[tuple[SparseDelta, dict[str, Any]]],
    ranks: Ranks | None,
) -> None:
    deltas = [delta for delta, _ in due]
    run, step = deltas[0].run, deltas[0].state.step
    if is_skipped(step, run.total_steps, run.config.stop_regrowing_at):
        if ranks is not None:
            check_same(ranks, deltas)
        for delta in deltas:
            delta.state.window = None
        return
    close = _Close(optimizers, criterion, deltas, [_rate(delta, group) for delta, group in due], ranks)
    run.record.unfinished = close.finish
    close.finish()


def _rate(delta: SparseDelta, group: dict[str, Any]) -> float:
    state, run, config = delta.state, delta.run, delta.run.config
    if state.fresh and state.closes == 0:
        # All deltas sit where chance put them: the first close replaces that choice as a whole.
        return 1.0
    if run.total_steps is not None:
        return regrow_rate(config.regrow_schedule, config.initial_regrow_rate, state.step, run.total_steps)
    return lr_following_rate(config.initial_regrow_rate, _learning_rate(group), state.max_lr)


class _Close:
    """One close of an adapter's cycle, which an exception may interrupt anywhere and `finish` completes.

    All exchanges are decided before anything changes. Then the matrices are changed, some at a time, by tensors that
    exist whole before the first of them is written; writing them twice does no harm.

    Args:
        optimizers: that took part in the step, the outermost first.
        criterion: the adapter's.
        deltas: whose cycle closes, ordered by name.
        rates: the share of each one's deltas that the schedule offers for replacement.
        ranks: those that close together; None: this process alone.
    """

    def __init__(
        self,
        optimizers: list[torch.optim.Optimizer],
        criterion: GrowthCriterion,
        deltas: list[SparseDelta],
        rates: list[float],
        ranks: Ranks | None,
    ) -> None:
        self.optimizers, self.criterion, self.ranks = optimizers, criterion, ranks
        self.deltas, self.rates, self.step = deltas, rates, deltas[0].state.step
        self.moves: list[_Move] | None = None
        self.report: CycleReport | None = None
        self.known: dict[int, int] = {}

    def finish(self) -> None:
        """Do what is left of the close: all of it, the first time.

        Raises:
            ValueError, TypeError, FloatingPointError: the close is refused and given up; nothing was changed.
        """
        record = self.deltas[0].run.record
        with torch.no_grad():
            if self.moves is None:
                try:
                    self.moves = self._decided()
                except Exception as error:
                    # Ranks decide together, once; a refusal would only be repeated.
                    if self.ranks is not None or isinstance(error, (ValueError, TypeError, FloatingPointError)):
                        for delta in self.deltas:
                            delta.state.window = None
                        record.unfinished = None
                    raise
            while self.moves:
                self.moves[-1].carry_out(self.optimizers, self.criterion)
                self.moves.pop()
        log = self.deltas[0].run.log
        if not log or log[-1] is not self.report:
            log.append(self.report)
        record.unfinished = None

    def _decided(self) -> list[_Move]:
        run, deltas = self.deltas[0].run, self.deltas
        for delta in deltas:
            check_state(self.optimizers, delta.values)
        refuse_ruined(deltas)
        for delta in deltas:
            narrow(delta)
        counts = [math.floor(rate * delta.k) for delta, rate in zip(deltas, self.rates, strict=True)]
        decided = iter(decide(self.ranks, self.criterion, deltas, counts))
        moves = [_Move(group, [next(decided) for _ in group], self.known) for group in joinable(deltas)]
        # What the host has to know of all matrices, in one go.
        device = deltas[0].values.device
        counted = counters(self.optimizers, [delta.values for delta in deltas])
        numbers = [number.to(device, torch.float64) for move in moves for number in move.numbers()]
        numbers += [count.to(device, torch.float64).view(()) for count in counted]
        table = torch.stack(numbers).tolist()
        replaced, magnitude = sum(table[: 2 * len(moves) : 2]), sum(table[1 : 2 * len(moves) : 2])
        self.known.update(zip(map(id, counted), map(int, table[2 * len(moves) :]), strict=True))
        total = sum(delta.k for delta in deltas)
        self.report = CycleReport(self.step, self.rates[0], int(replaced), total - int(replaced), magnitude / total)
        logger.info("adapter %s: step %d, %d of %d deltas move", run.adapter_name, self.step, replaced, total)
        return moves[::-1]  # taken from the end


class _Move:
    """What a close does to some matrices.

    Args:
        deltas: of the matrices.
        incoming: the positions that come into the slots of each.
        known: filled, before `carry_out`, with the optimizers' counts of steps (see `reseeded_states`).
    """

    def __init__(self, deltas: list[SparseDelta], incoming: list[Tensor], known: dict[int, int]) -> None:
        self.deltas, self.incoming, self.known = deltas, incoming, known
        self.closes = [delta.state.closes + 1 for delta in deltas]
        self.writes: list[Callable[[], Any]] | None = None

    def numbers(self) -> tuple[Tensor, Tensor]:
        """How many deltas move, and the sum of all absolute values; scalars on the device."""
        entries = Joined([delta.k for delta in self.deltas], self.incoming[0].device)
        values = entries.join([delta.values.detach() for delta in self.deltas])
        return (entries.join(self.incoming) >= 0).sum(), values.abs().sum(dtype=torch.float64)

    def carry_out(self, optimizers: list[torch.optim.Optimizer], criterion: GrowthCriterion) -> None:
        """Compute everything that changes, then write it. May be called again after an exception."""
        if self.writes is None:
            self.writes = self._computed(optimizers, criterion)
        for write in self.writes:
            write()
        for delta, closes in zip(self.deltas, self.closes, strict=True):
            delta.state.closes, delta.state.window = closes, None

    def _computed(self, optimizers: list[torch.optim.Optimizer], criterion: GrowthCriterion) -> list[Callable[[], Any]]:
        deltas, index_sets = self.deltas, [delta.indices for delta in self.deltas]
        moves = Moves.of(index_sets, self.incoming)
        seeds = _seeds(deltas, moves) if criterion.gathers else None
        writes = reseeded_states(optimizers, [delta.values for delta in deltas], moves, seeds, self.known)
        writes.append(partial(copy_all, index_sets, moves.indices(index_sets[0].dtype)))
        values = [delta.values.detach() for delta in deltas]
        grads = [delta.values.grad for delta in deltas]
        writes.append(partial(copy_all, values, moves.moved(values)))
        if all(grad is not None for grad in grads):
            writes.append(partial(copy_all, grads, moves.moved(grads)))
        else:
            for number, grad in enumerate(grads):
                if grad is not None:
                    writes.append(partial(copy_all, [grad], moves.single(number).moved([grad])))
        return writes


def _seeds(deltas: list[SparseDelta], moves: Moves) -> GrownSeeds:
    """What the windows of the matrices say of the positions that come in."""
    dtype = torch.promote_types(deltas[0].values.dtype, torch.float32)
    windows = [delta.state.window for delta in deltas]
    steps = windows[0].steps if windows[0] is not None else 0
    if not steps:
        nothing = torch.full(moves.incoming.shape, math.nan, dtype=dtype, device=moves.incoming.device)
        return GrownSeeds(nothing, nothing, deltas[0].state.step)
    candidates = Joined([window.positions.numel() for window in windows], moves.entries.device)
    keys = candidates.keys(candidates.join([window.positions for window in windows]))
    sums = candidates.join([window.sums for window in windows]) / steps
    squares = candidates.join([window.squares for window in windows]) / steps
    mean, mean_square = look_up(moves, keys, [sums.to(dtype), squares.to(dtype)], math.nan)
    return GrownSeeds(mean, mean_square, deltas[0].state.step)


def attach(optimizer: torch.optim.Optimizer, model: nn.Module, total_steps: int | None) -> list[AdapterRun]:
    """Check that `optimizer` steps deltas of `model`, and set the length of their runs.

    A run needs no attaching: its first step finds the deltas. This checks before the first step.

    Args:
        optimizer: it may be wrapped.
        model: any module that contains SpIEL layers.
        total_steps: optimizer steps of the run; None keeps what the config says.

    Returns:
        The runs of the adapters that the optimizer steps.

    Raises:
        ValueError: see above; nothing is changed then.
        TypeError: the optimizer keeps state that cannot follow the indices, see `check_optimizer`.
    """
    check_total_steps(total_steps)
    optimizer = _unwrapped(optimizer)
    ours = {id(module) for module in model.modules() if isinstance(module, SparseDelta)}
    if not any(id(delta) in ours for delta, _ in held_deltas(optimizer)):
        raise ValueError(
            "the optimizer holds none of the model's SpIEL values: build it from the trainable parameters of the model "
            "after get_peft_model, e.g. AdamW(p for p in model.parameters() if p.requires_grad)"
        )
    held = [delta for delta, _ in held_deltas(optimizer, idle=True) if id(delta) in ours]
    check_optimizer(optimizer, held)
    carry(optimizer)
    for delta in held:
        delta.restore_dtype()
        if owned_by_another(delta, optimizer):
            begin_run(delta)
            set_total_steps(delta.run, delta.run.config.total_steps)
    attached = list({id(delta.run): delta.run for delta in held}.values())
    if total_steps is not None:
        for run in attached:
            set_total_steps(run, total_steps)
    return attached


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer in accelerate's and our own wrappers, which have no hooks; others around optimizers have."""
    while True:
        inner = getattr(optimizer, "optimizer", None) or getattr(optimizer, "base_optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer) or "_optimizer_step_post_hooks" in vars(optimizer):
            return optimizer
        optimizer = inner
