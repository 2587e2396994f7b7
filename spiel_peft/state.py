"""Training state of one delta (step count, open window, SM3 accumulators) and the settings that it depends on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

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

# Integers for `TrainingState.fresh`, in files and among ranks.
FRESH_CODES = {None: -1, False: 0, True: 1}


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
        found: of the candidates that this step has chosen or proposed, what only the device knows yet
            (`spiel_kernels.Largest.found`).
        opening: the gradients at these candidates, before they are collected.
    """

    pending: Tensor | None = None
    probe: Tensor | None = None
    probe_sums: Tensor | None = None
    graph_task: int = -1
    seen: Tensor | None = None
    accumulated: bool = False
    proposed: Tensor | None = None
    found: Tensor | None = None
    opening: Tensor | None = None


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
        reached: whether the values have had a gradient in a step of this run.
        saved_cycle: `regrow_every` and `accumulation_steps` of the run that a loaded state is of, if it says so.
        sought: whether the live optimizers have been searched for loaded state of this delta.
        with_optimizer: whether an optimizer was loaded with the same state, and has not stepped since.
        owner: the optimizer that stepped the delta last in this run. None for a state that was just loaded or copied:
            the optimizer that steps it first continues its run.
        compared: whether the ranks that train together have compared their settings for this state.
        misled: whether a sample has misled the last search for candidates, so that the next one waits for the device.

    Copies and pickles leave out `owner` and `compared`, which hold in this process only.
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
    reached: bool = False
    saved_cycle: tuple[int, int] | None = None
    sought: bool = False
    with_optimizer: bool = False
    owner: weakref.ref[torch.optim.Optimizer] | None = None
    compared: bool = False
    misled: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "owner": None, "compared": False}

    @property
    def finished(self) -> bool:
        """Whether the run has reached its end; another step of the delta begins a new one."""
        return 0 < self.total_steps <= self.step

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors; empty before the first step."""
        if self.step == 0:
            return {}
        window_steps = self.window.steps if self.window is not None else 0
        out = {
            PROGRESS: torch.tensor([self.step, self.closes, FRESH_CODES[self.fresh], window_steps, self.total_steps]),
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
        decoded = {code: value for value, code in FRESH_CODES.items()}[fresh]
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


# The settings that a run's training state depends on: saved with it, and compared before it is taken back.


# What each difference means to a user who resumes.
_REMEDIES = {
    "num_deltas": "another budget; set r, density or num_deltas as the checkpoint has it",
    "weight_shape": "another model; resume on the model that the checkpoint was made with",
    "growth": "another growth criterion",
}


@dataclass(frozen=True)
class RunSettings:
    """What a run was trained with, as far as the one that resumes it has to know.

    The first three must be the same. Whatever else a config says of the cycle may change: it acts on later closes.

    Attributes:
        num_deltas: k of this matrix.
        weight_shape: the adapted weight, seen as a matrix ``(rows, cols)``.
        growth: name of the growth criterion.
        regrow_every, accumulation_steps: as in the config, optimizer steps; with other ones a resumed run goes on by
            the new schedule, which is told to the user.
    """

    num_deltas: int
    weight_shape: tuple[int, int]
    growth: str
    regrow_every: int
    accumulation_steps: int

    @property
    def numel(self) -> int:
        """Entries of the adapted weight."""
        rows, cols = self.weight_shape
        return rows * cols

    def tensors(self) -> dict[str, Tensor]:
        """Five int64 numbers, and the criterion's name as UTF-8 bytes: what an adapter file can hold."""
        numbers = [self.num_deltas, *self.weight_shape, self.regrow_every, self.accumulation_steps]
        return {SETTINGS: torch.tensor(numbers), GROWTH: torch.tensor(list(self.growth.encode()), dtype=torch.uint8)}


def check_settings(tensors: Mapping[str, Tensor], own: RunSettings) -> tuple[str, str] | None:
    """Name the tensor that says another run was saved than `own` can resume, and how it differs; None if it fits.

    Both tensors are optional, but only together.
    """
    numbers, growth = tensors.get(SETTINGS), tensors.get(GROWTH)
    if numbers is None and growth is None:
        return None
    for name, tensor in ((SETTINGS, numbers), (GROWTH, growth)):
        if tensor is None:
            return name, "is missing, while the rest of the run's settings is there"
    if numbers.dtype != torch.int64 or tuple(numbers.shape) != (5,):
        return SETTINGS, f"must be five int64 numbers, got {numbers.dtype} of shape {tuple(numbers.shape)}"
    if growth.dtype != torch.uint8 or growth.dim() != 1:
        return GROWTH, f"must be bytes, got {growth.dtype} of shape {tuple(growth.shape)}"
    k, rows, cols, *cycle = numbers.tolist()
    if min(k, rows, cols, *cycle) < 1:
        return SETTINGS, f"has a number out of range ({numbers.tolist()})"
    name = bytes(growth.tolist()).decode(errors="replace")
    return _difference(RunSettings(k, (rows, cols), name, *cycle), own)


def _difference(saved: RunSettings, own: RunSettings) -> tuple[str, str] | None:
    theirs, ours = asdict(saved), asdict(own)
    for name, remedy in _REMEDIES.items():
        if theirs[name] != ours[name]:
            what = (
                f"is of a run with {name}={theirs[name]!r}, the adapter to be resumed has {name}={ours[name]!r} "
                f"({remedy}). Resume with the settings of the checkpoint; to begin a new run from its deltas, load it "
                "with is_trainable=False, save it, and load that"
            )
            return (GROWTH if name == "growth" else SETTINGS), what
    return None
