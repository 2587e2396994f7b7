"""What one sparse delta remembers of its training run, and how that travels in a state dict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

PROGRESS = "spiel_progress"
MAX_LR = "spiel_max_lr"
CANDIDATES = "spiel_candidates"
CANDIDATE_SUMS = "spiel_candidate_sums"
CANDIDATE_SQUARES = "spiel_candidate_squares"
ROW = "spiel_row"
COL = "spiel_col"
SETTINGS = "spiel_settings"
GROWTH = "spiel_growth"
STATE_KEYS = (PROGRESS, MAX_LR, CANDIDATES, CANDIDATE_SUMS, CANDIDATE_SQUARES, ROW, COL, SETTINGS, GROWTH)

_FRESH_CODES = {None: -1, False: 0, True: 1}


@dataclass
class CandidateWindow:
    """Gradients of the positions that may be grown, collected over the steps of one window.

    Attributes:
        positions: sorted flat positions ``[c]`` in the index dtype.
        sums: sum over the window's steps of one gradient per step, ``[c]`` float32 (float64 for float64 deltas).
        squares: sum over the window's steps of its square, ``[c]``.
        steps: optimizer steps that counted so far.
        shared: chosen by several ranks together, at the end of a step; a step that does not count leaves it.
    """

    positions: Tensor
    sums: Tensor
    squares: Tensor
    steps: int = 0
    shared: bool = False


@dataclass
class StepGradient:
    """What the micro-batches of the optimizer step in progress have contributed; never saved.

    Attributes:
        pending: raw gradient of the candidates summed over micro-batches, ``[c]``.
        probe: slots of a few active deltas, int64.
        probe_sums: their raw gradient summed over micro-batches; compared with ``values.grad`` at the step, it tells
            by which factor the trainer has scaled, averaged and clipped.
        graph_task: id of the autograd pass that contributed last.
        seen: ``values.grad`` at the probes just before the step, where it could be noted.
        accumulated: whether the SM3 accumulators have been given this step's gradient.
        proposed: sorted positions that this rank proposes as candidates, in the index dtype; `pending` is of these
            then. Only where several ranks train together.
    """

    pending: Tensor | None = None
    probe: Tensor | None = None
    probe_sums: Tensor | None = None
    graph_task: int = -1
    seen: Tensor | None = None
    accumulated: bool = False
    proposed: Tensor | None = None


@dataclass(eq=False)
class TrainingState:
    """Progress of one delta's training run.

    Attributes:
        step: optimizer steps that counted since the run began.
        closes: closed cycles.
        fresh: whether all deltas of the adapter were zero when the run began; None until the first step.
        total_steps: length of the run as far as it was known at the last step; 0 if unknown.
        max_lr: highest learning rate seen so far.
        window: the open window, if any.
        row, col: SM3 accumulators ``[rows]`` and ``[cols]``, present once used.
        current: contributions to the step in progress.
        unheld_steps: gradient accumulations seen since an optimizer last stepped this delta.
        saved_cycle: `regrow_every` and `accumulation_steps` of the run that a loaded state is of, if it says so.
        sought: whether the optimizers alive have been asked if they were loaded with state for this delta.
        with_optimizer: whether an optimizer was loaded with the same state, and has not stepped since.
    """

    step: int = 0
    closes: int = 0
    fresh: bool | None = None
    total_steps: int = 0
    max_lr: float = 0.0
    window: CandidateWindow | None = None
    row: Tensor | None = None
    col: Tensor | None = None
    current: StepGradient = field(default_factory=StepGradient)
    unheld_steps: int = 0
    saved_cycle: tuple[int, int] | None = None
    sought: bool = False
    with_optimizer: bool = False

    @property
    def finished(self) -> bool:
        """Whether the run has reached its end: whoever steps the delta again begins a new one."""
        return 0 < self.total_steps <= self.step

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors; empty before the first step."""
        if self.step == 0:
            return {}
        window_steps = self.window.steps if self.window is not None else 0
        out = {
            PROGRESS: torch.tensor([self.step, self.closes, _FRESH_CODES[self.fresh], window_steps, self.total_steps]),
            MAX_LR: torch.tensor([self.max_lr], dtype=torch.float64),
        }
        # One that this process alone has opened belongs to a step that is not over, and is not saved.
        if self.window is not None and (window_steps or self.window.shared):
            out[CANDIDATES] = self.window.positions
            out[CANDIDATE_SUMS] = self.window.sums.contiguous()
            out[CANDIDATE_SQUARES] = self.window.squares.contiguous()
        if self.row is not None and self.col is not None:
            out[ROW], out[COL] = self.row, self.col
        return out

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], device: torch.device) -> TrainingState:
        """Inverse of `tensors`; tensors are copied to `device`. No progress entry: a new run."""
        if PROGRESS not in tensors:
            return cls()
        step, closes, fresh, window_steps, total_steps = (int(v) for v in tensors[PROGRESS].tolist())
        decoded = {code: value for value, code in _FRESH_CODES.items()}[fresh]
        state = cls(step=step, closes=closes, fresh=decoded, total_steps=total_steps)
        if MAX_LR in tensors:
            state.max_lr = float(tensors[MAX_LR].item())
        if SETTINGS in tensors:
            state.saved_cycle = int(tensors[SETTINGS][3]), int(tensors[SETTINGS][4])
        if CANDIDATES in tensors:
            state.window = CandidateWindow(
                positions=tensors[CANDIDATES].to(device, copy=True),
                sums=tensors[CANDIDATE_SUMS].to(device, copy=True),
                squares=tensors[CANDIDATE_SQUARES].to(device, copy=True),
                steps=window_steps,
                shared=window_steps == 0,
            )
        if ROW in tensors:
            state.row = tensors[ROW].to(device, copy=True)
            state.col = tensors[COL].to(device, copy=True)
        return state

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` (a move to another device) to every tensor held."""
        if self.window is not None:
            self.window.positions = fn(self.window.positions)
            self.window.sums = fn(self.window.sums)
            self.window.squares = fn(self.window.squares)
        if self.row is not None and self.col is not None:
            self.row, self.col = fn(self.row), fn(self.col)
        current = self.current
        if current.pending is not None:
            current.pending = fn(current.pending)
        if current.proposed is not None:
            current.proposed = fn(current.proposed)
        if current.probe is not None and current.probe_sums is not None:
            current.probe, current.probe_sums = fn(current.probe), fn(current.probe_sums)
