"""Ranks that train together: their collective operations, and the comparisons that keep them in agreement.

At every step ranks compare their place in the run, at every close their deltas and decisions.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..delta import SparseDelta
from ..growth import GrowthCriterion
from ..state import FRESH_CODES
from .close import propose, prune_scores
from .exchange import exchanges, joinable

logger = logging.getLogger(__name__)

# Elements per collective, unless a single tensor has more: small tensors are sent together to save latency, large ones
# alone to save copies.
BUCKET = 1 << 20

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd 64-bit multipliers with well mixed bits; their products wrap around.
_BY_VALUE, _BY_PLACE, _AGAIN = 0x5851F42D4C957F2D, 0x14057B7EF767814F, 0x2545F4914F6CDD1D
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Ranks:
    """Two or more processes that train together. Every method that communicates must be called by all of them.

    Attributes:
        group: the process group.
    """

    group: Any

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def index(self) -> int:
        """This process's place in the group."""
        return dist.get_rank(self.group)

    def name(self, index: int) -> int:
        """The global rank of a member."""
        return dist.get_global_rank(self.group, index)

    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, all of one shape: ``[size, *shape]`` in the order of the group."""
        out = tensor.new_empty((self.size, *tensor.shape))
        dist.all_gather(list(out.unbind(0)), tensor.contiguous(), group=self.group)
        return out

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor, in place, by its sum over the ranks; they are contiguous."""
        for bucket in in_buckets(tensors):
            if len(bucket) == 1:
                dist.all_reduce(bucket[0], group=self.group)
                continue
            flat = torch.cat([tensor.view(-1) for tensor in bucket])
            dist.all_reduce(flat, group=self.group)
            for tensor, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.view(-1).copy_(total)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite the tensor, in place, with that of the group's member `source`; returns it."""
        dist.broadcast(tensor, self.name(source), group=self.group)
        return tensor

    def broadcast_flat(self, tensor: Tensor) -> Tensor:
        """The first rank's one-dimensional tensor, which may be of another length than this rank's."""
        size = self.broadcast(torch.tensor([tensor.numel()], device=tensor.device))
        return self.broadcast(tensor.contiguous() if self.index == 0 else tensor.new_empty(int(size)))


def in_buckets(tensors: Sequence[Tensor], limit: int = BUCKET) -> Iterator[list[Tensor]]:
    """Lists of neighbouring tensors of one dtype and device, with up to `limit` elements or of one tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        like = bucket and bucket[0].dtype == tensor.dtype and bucket[0].device == tensor.device
        if bucket and (not like or sum(t.numel() for t in bucket) + tensor.numel() > limit):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def checksum(tensor: Tensor) -> Tensor:
    """An int64 (0-dimensional, on the tensor's device) that depends on every bit of a tensor and on its place.

    Ranks compare tensors by it without sending them. A sum of integers that wraps around does not depend on the order
    in which a device adds them.
    """
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    # In pieces: an int64 copy of a large matrix's deltas is more than they take themselves.
    for start in range(0, bits.numel(), _CHUNK):
        piece = bits[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start + 1, start + 1 + piece.numel(), device=flat.device)
        mixed = (piece + 1) * _BY_VALUE + places * _BY_PLACE
        mixed = (mixed ^ (mixed >> 29)) * _AGAIN
        total += (mixed ^ (mixed >> 32)).sum()
    return total


# Ranks exchange a few numbers at every step and checksums at every close. Every rank compares the same table, so that
# all ranks go on or all raise, and none is left waiting.

# Outcomes of a step as one rank sees it.
SKIPPED, TOOK_PLACE, WITHOUT_GRADIENT = 0, 1, 2

_SAME_RUN = "build the model with the same SpIELConfig and load the same checkpoint on every rank"
# The fields that are compared at every step besides the outcome, each with the remedy for a difference.
_STEP_FIELDS = {
    "optimizer steps so far": "step the optimizer equally often, and load the same checkpoint, on every rank",
    "closed cycles": _SAME_RUN,
    "total_steps": "pass the same total_steps on every rank, as a data loader's length may differ between ranks",
    "whether all deltas were zero when the run began": _SAME_RUN,
    "the number of deltas in the optimizer": "use an optimizer that does not distribute parameters over the ranks",
    "steps in open windows": _SAME_RUN,
    "the adapter's settings or its training state": _SAME_RUN,
}


def agree_on_step(ranks: Ranks, deltas: list[SparseDelta], outcome: Tensor) -> int:
    """Compare the ranks' places in the run, and agree whether the step that has just been taken counts.

    Args:
        ranks: those that have taken the step.
        deltas: that the optimizer has stepped, of one adapter, ordered by name.
        outcome: integer scalar, this rank's `SKIPPED`, `TOOK_PLACE` or `WITHOUT_GRADIENT`.

    Returns:
        The common outcome: a step that any rank skipped is skipped by all.

    Raises:
        RuntimeError: on every rank, if they are not at the same place of the same run.
    """
    device = deltas[0].values.device
    row = torch.tensor([0, *_place_in_run(deltas)], device=device)
    row[0] = outcome
    # A step waits for the device here anyway.
    table = ranks.gather(row).tolist()
    for column, (field, remedy) in enumerate(_STEP_FIELDS.items(), start=1):
        said = [of_rank[column] for of_rank in table]
        if len(set(said)) > 1:
            by_rank = ", ".join(f"{value} on rank {ranks.name(index)}" for index, value in enumerate(said))
            shown = "" if column == len(_STEP_FIELDS) else f" ({by_rank})"
            raise RuntimeError(
                f"adapter {deltas[0].run.adapter_name!r}: the ranks that train it together disagree on {field}{shown}. "
                f"To go on they have to be at the same step of the same run: {remedy}."
            )
    for delta in deltas:
        delta.state.compared = True
    outcomes = {of_rank[0] for of_rank in table}
    return outcomes.pop() if len(outcomes) == 1 else SKIPPED


def _place_in_run(deltas: list[SparseDelta]) -> list[int]:
    first = deltas[0].state
    window_steps = sum(1 + delta.state.window.steps for delta in deltas if delta.state.window is not None)
    new = not all(delta.state.compared for delta in deltas)
    return [
        first.step,
        first.closes,
        deltas[0].run.total_steps or 0,
        FRESH_CODES[first.fresh],
        len(deltas),
        window_steps,
        _fingerprint(deltas) if new else 0,
    ]


def _fingerprint(deltas: list[SparseDelta]) -> int:
    """A hash of the settings and the training state that decide how the run goes on."""
    c = deltas[0].run.config
    parts: list[object] = [c.growth, c.regrow_every, c.accumulation_steps, c.initial_regrow_rate]
    parts += [c.regrow_schedule, c.stop_regrowing_at, c.seed, c.candidates]
    for delta in deltas:
        parts += [delta.module_name, delta.weight_shape, delta.k]
        parts += [(name, int(checksum(tensor))) for name, tensor in sorted(delta.state.tensors().items())]
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


# Closes

_CLOSE_FIELDS = {
    "values": "they were changed on some ranks only, or optimizers differ (state, learning rate, steps taken)",
    "indices": "they were changed on some ranks only",
    "number of deltas to replace": "total_steps or learning rates differ between ranks",
    "decision what to prune and grow": "a fault of this package or of the growth criterion: please report it",
}


def check_same(ranks: Ranks, deltas: list[SparseDelta]) -> None:
    """Raise a RuntimeError on every rank unless all of them hold the same indices and values."""
    columns = [[checksum(delta.values), checksum(delta.indices)] for delta in deltas]
    _compare(ranks, deltas, ranks.gather(_table(columns)))


def decide(
    ranks: Ranks | None, criterion: GrowthCriterion, deltas: list[SparseDelta], counts: Sequence[int]
) -> list[Tensor]:
    """The exchanges of a close, ``incoming`` ``[k]`` for each delta, one decision for all ranks.

    All ranks compute them from the same sums. If a growth criterion proposes other positions on some rank, all follow
    the first rank.

    Args:
        ranks: the ranks that close together; None: this process alone.
        criterion: the adapter's growth criterion.
        deltas: the deltas whose cycle closes, ordered by name.
        counts: how many each of them is to replace at most.

    Raises:
        ValueError: the criterion's proposals or scores are not allowed (see `propose` and `prune_scores`).
        RuntimeError: on every rank, if their indices, values or decisions differ, or the criterion failed on another.
    """
    if ranks is not None:
        return _decide_together(ranks, criterion, deltas, counts)
    decided: list[Tensor] = []
    for group in joinable(deltas):
        numbers = counts[len(decided) : len(decided) + len(group)]
        scores = prune_scores(criterion, group, numbers)
        proposed = [propose(criterion, *of_delta) for of_delta in zip(group, numbers, strict=True)]
        decided += _exchanges(group, scores, proposed, numbers)
    return decided


def _exchanges(
    deltas: Sequence[SparseDelta], scores: Sequence[Tensor], proposed: Sequence[Tensor], counts: Sequence[int]
) -> list[Tensor]:
    return exchanges([delta.indices for delta in deltas], scores, proposed, counts)


def _decide_together(
    ranks: Ranks, criterion: GrowthCriterion, deltas: list[SparseDelta], counts: Sequence[int]
) -> list[Tensor]:
    decided: list[Tensor] = []
    scores, rows, error = [], [], None
    for group in joinable(deltas):
        numbers = counts[len(decided) : len(decided) + len(group)]
        proposed = []
        for delta, count in zip(group, numbers, strict=True):
            try:
                of_delta = prune_scores(criterion, [delta], [count])[0]
                positions = propose(criterion, delta, count)
            except Exception as failure:  # of any kind: the other ranks have to be told
                of_delta, positions = delta.values.detach().abs(), delta.indices[:0].to(torch.int64)
                error = error or failure
            scores.append(of_delta)
            proposed.append(positions)
        of_group = _exchanges(group, scores[len(decided) :], proposed, numbers)
        for delta, count, incoming, positions in zip(group, numbers, of_group, proposed, strict=True):
            rows.append([*_row(delta, count, incoming), checksum(positions)])
        decided += of_group
    device = deltas[0].values.device
    gathered = ranks.gather(torch.cat([_table(rows).view(-1), torch.tensor([error is not None], device=device)]))
    _raise_failure(ranks, criterion, error, gathered[:, -1].tolist())
    table = gathered[:, :-1].view(ranks.size, len(deltas), -1)
    differing = (table[:, :, -1] != table[:1, :, -1]).any(0).tolist()
    if not any(differing):
        _compare(ranks, deltas, table[:, :, :-1])
        return decided
    _compare(ranks, deltas, table[:, :, :3])
    logger.warning("growth criterion %r proposes other positions on other ranks: the first rank's hold", criterion.name)
    for place, (delta, count) in enumerate(zip(deltas, counts, strict=True)):
        if differing[place]:
            own = propose(criterion, delta, count) if ranks.index == 0 else delta.indices[:0].to(torch.int64)
            decided[place] = _exchanges([delta], [scores[place]], [ranks.broadcast_flat(own)], [count])[0]
    rows = [_row(*of_delta) for of_delta in zip(deltas, counts, decided, strict=True)]
    _compare(ranks, deltas, ranks.gather(_table(rows)))
    return decided


def _row(delta: SparseDelta, count: int, incoming: Tensor) -> list[Tensor]:
    number = torch.tensor(count, device=delta.values.device)
    return [checksum(delta.values), checksum(delta.indices), number, checksum(incoming)]


def _table(rows: list[list[Tensor]]) -> Tensor:
    device = rows[0][0].device
    return torch.stack([torch.stack([entry.to(device) for entry in row]) for row in rows])


def _raise_failure(ranks: Ranks, criterion: GrowthCriterion, error: Exception | None, failed: list[int]) -> None:
    if error is not None:
        raise error
    if any(failed):
        names = [ranks.name(index) for index, has in enumerate(failed) if has]
        raise RuntimeError(f"growth criterion {criterion.name!r} failed on ranks {names}; see the error there")


def _compare(ranks: Ranks, deltas: list[SparseDelta], table: Tensor) -> None:
    """Raise a RuntimeError that names field, module and ranks if rows of ``[ranks, deltas, fields]`` differ."""
    unequal = table != table[:1]
    if not bool(unequal.any()):
        return
    place = int(unequal.any(2).any(0).nonzero()[0])
    field = int(unequal[:, place].any(0).nonzero()[0])
    others = [ranks.name(index) for index in unequal[:, place, field].nonzero().flatten().tolist()]
    more = int(unequal.any(2).any(0).sum()) - 1
    name, cause = list(_CLOSE_FIELDS.items())[field]
    raise RuntimeError(
        f"adapter {deltas[place].run.adapter_name!r}, step {deltas[place].state.step}: the {name} of module "
        f"{deltas[place].module_name!r} on ranks {others} {'differ' if name.endswith('s') else 'differs'} from rank "
        f"{ranks.name(0)}'s" + (f", and {more} more modules differ" if more else "") + f". Likely cause: {cause}. "
        "Training stops here, as the ranks would go on with different models; resume from the last checkpoint."
    )
