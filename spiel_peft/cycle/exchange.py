"""The exchanges of a close, for several matrices at once: which deltas make room, and for which positions.

Nothing here waits for the device. Tensors have sizes that are known beforehand, and what was decided stays on the
device: an exchange is a tensor ``incoming`` ``[k]`` that holds, for every slot of an index set, the position that takes
the slot's place, or `STAYS`. Worked example, a matrix with the deltas 1, 3 and 5, of which 3 makes room for 2::

    indices  [1, 3, 5]      incoming  [-1, 2, -1]      after the close  [1, 2, 5]

On a GPU every launch costs the same for few entries as for many, so that the entries of several matrices are joined,
one matrix after the other. Their keys, position plus a multiple of 2**50 by matrix, ascend over all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spiel_kernels import sorted_order
from spiel_kernels.dispatch import on_host
from spiel_kernels.index_set import true_slots

from ..delta import SparseDelta

STAYS = -1
# Stands for "no position" among proposals.
NO_POSITION = -1
_KEYS = 1 << 50  # more than any matrix has entries
_MOST_MATRICES = 1 << 12
# Bytes that are held for each delta while its matrix closes, roughly, and how many for all that are joined.
_BYTES_PER_DELTA = 128
_JOINED_BYTES = 64 << 20


def joinable(deltas: Iterable[SparseDelta]) -> list[list[SparseDelta]]:
    """Neighbouring deltas that close together: of one device and dtype, 64 MiB of temporary memory at most.

    On a CPU every matrix closes by itself, as small tensors stay in the caches.
    """
    groups: list[list[SparseDelta]] = []
    held, kind = 0, None
    for delta in deltas:
        window = delta.state.window
        own = delta.values.device, delta.values.dtype, delta.state.step, None if window is None else window.steps
        size = delta.k * _BYTES_PER_DELTA
        fits = own == kind and held + size <= _JOINED_BYTES and len(groups[-1]) < _MOST_MATRICES
        if not fits or on_host(delta.values):
            groups.append([])
            held, kind = 0, own
        groups[-1].append(delta)
        held += size
    return groups


class Joined:
    """Entries of several matrices, one matrix after the other.

    Args:
        sizes: entries of each matrix.
        device: on which they are.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes, self.device = list(sizes), device
        self.single = len(self.sizes) == 1

    @cached_property
    def bounds(self) -> Tensor:
        """int64 ``[matrices + 1]``: the first entry of each, and the number of entries."""
        return torch.tensor([0, *self.sizes]).cumsum(0).to(self.device)

    @cached_property
    def owner(self) -> Tensor:
        """int64 ``[entries]``: number of the matrix of each entry."""
        numbers = torch.arange(len(self.sizes), device=self.device)
        return torch.repeat_interleave(numbers, self.bounds.diff(), output_size=sum(self.sizes))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0] if self.single else torch.cat(list(parts))

    def split(self, joined: Tensor) -> list[Tensor]:
        return [joined] if self.single else list(joined.split(self.sizes))

    def slice(self, number: int) -> slice:
        """The entries of one matrix."""
        first = sum(self.sizes[:number])
        return slice(first, first + self.sizes[number])

    def keys(self, positions: Tensor) -> Tensor:
        """int64 keys of positions; negative ones, which are no positions, are returned as -1."""
        positions = positions.to(torch.int64)
        if self.single:
            return positions
        return torch.where(positions < 0, positions, torch.add(positions, self.owner, alpha=_KEYS))

    def positions(self, keys: Tensor) -> Tensor:
        """The inverse of `keys`."""
        return keys if self.single else keys.bitwise_and(_KEYS - 1)

    def of_owner(self, per_matrix: Tensor) -> Tensor:
        """What holds for each matrix ``[matrices]``, for each of its entries."""
        return per_matrix if self.single else per_matrix.index_select(0, self.owner)

    def count(self, mask: Tensor) -> Tensor:
        """int64 ``[matrices]``: how many entries of each matrix are True."""
        if self.single:
            return mask.sum(0, keepdim=True)
        totals = torch.cat([self.bounds[:1], mask.cumsum(0)])
        return totals.index_select(0, self.bounds).diff()

    def places(self, mask: Tensor) -> Tensor:
        """int64 ``[entries]``: how many entries of the same matrix up to and with this one are True."""
        totals = mask.cumsum(0)
        if self.single:
            return totals
        before = torch.cat([self.bounds[:1], totals]).index_select(0, self.bounds[:-1])
        return totals - self.of_owner(before)

    def order(self, scores: Tensor) -> Tensor:
        """int64 ``[entries]``: the entries, matrix by matrix, by rising score; of equal ones the earlier comes first.

        Args:
            scores: floating, no NaN.
        """
        order = sorted_order(scores)
        return order if self.single else order.index_select(0, sorted_order(self.owner.index_select(0, order)))

    @cached_property
    def starts(self) -> Tensor:
        """int64: the first entry of the matrix of each entry."""
        return self.of_owner(self.bounds[:-1])


def exchanges(
    index_sets: Sequence[Tensor], scores: Sequence[Tensor], proposed: Sequence[Tensor], counts: Sequence[int]
) -> list[Tensor]:
    """Prune the deltas with the lowest scores in favour of the best proposals, in each of several matrices.

    In each matrix the m active deltas with the lowest scores are pruned (ties: the lowest position first) and the m
    best proposals outside the kept set are grown. A proposal that was just pruned comes back and keeps its delta. m is
    the largest number, `counts` at most, that the proposals can fill.

    Args:
        index_sets: integer ``[k]`` each, sorted, unique.
        scores: floating ``[k]`` each, what the deltas are worth, without NaN; SpIEL takes their absolute values.
        proposed: integer ``[c]`` each, positions without repeats, best first, active ones allowed; `NO_POSITION`, as
            often as wanted, stands for none.
        counts: how many to prune at most.

    Returns:
        ``incoming`` ``[k]`` for each, in the dtype of its indices. Which of the slots that are pruned gets which
        position means nothing.
    """
    device = index_sets[0].device
    slots_of = Joined([indices.numel() for indices in index_sets], device)
    offers = Joined([positions.numel() for positions in proposed], device)
    active, joined_scores = slots_of.keys(slots_of.join(index_sets)), slots_of.join(scores)
    offered = offers.join(proposed).to(torch.int64)
    total = active.numel()
    if not offered.numel() or not total:
        return [torch.full_like(indices, STAYS) for indices in index_sets]

    order = slots_of.order(joined_scores)
    # How early a slot would be pruned, from 0 in each matrix.
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(total, device=device))
    keys = offers.keys(offered)
    slots = _search_sorted(active, keys)
    is_active = active.index_select(0, slots) == keys
    starts = offers.of_owner(slots_of.bounds[:-1])  # of the matrix of each offer, among the slots
    # Inactive offers have rank -1, as they are always eligible; active ones are eligible only if they would be pruned.
    offer_rank = torch.where(is_active, rank.index_select(0, slots) - starts, torch.where(keys < 0, total, -1))
    most = torch.tensor(counts).to(device)
    m = _largest_fillable(slots_of, offers, rank, slots, is_active, keys, most)

    eligible = offer_rank < offers.of_owner(m)
    chosen = eligible & (offers.places(eligible) <= offers.of_owner(m))
    # The last entry takes what belongs nowhere.
    back = torch.zeros(total + 1, dtype=torch.bool, device=device)
    back.scatter_(0, torch.where(chosen & is_active, slots, total), True)
    leaves = (rank - slots_of.starts < slots_of.of_owner(m)) & ~back[:total]
    grown = chosen & ~is_active
    in_turn = torch.full((total + 1,), STAYS, dtype=torch.int64, device=device)
    in_turn.scatter_(0, torch.where(grown, starts + offers.places(grown) - 1, total), offered)
    turn = (slots_of.starts + slots_of.places(leaves) - 1).clamp_(min=0)
    incoming = torch.where(leaves, in_turn.index_select(0, turn), STAYS)
    return slots_of.split(incoming.to(index_sets[0].dtype))


def _search_sorted(sorted_keys: Tensor, keys: Tensor) -> Tensor:
    """The first slot of each key in `sorted_keys` or, if it is not there, any slot; int64."""
    last = sorted_keys.numel() - 1
    if not on_host(keys):
        return torch.searchsorted(sorted_keys, keys).clamp_(max=last)
    # Looked up in ascending order, which takes half the time of any other on a CPU.
    by_key = sorted_order(keys)
    slots = torch.empty_like(by_key)
    slots[by_key] = torch.searchsorted(sorted_keys, keys.index_select(0, by_key))
    return slots.clamp_(max=last)


def _largest_fillable(
    slots_of: Joined, offers: Joined, rank: Tensor, slots: Tensor, is_active: Tensor, keys: Tensor, most: Tensor
) -> Tensor:
    """int64 ``[matrices]``: the largest m up to `most` for which m offers are eligible once m deltas are pruned.

    Pruning one more delta makes at most one more offer eligible, so the surplus of offers never grows with m.
    """
    total = rank.numel()
    inactive = offers.count((keys >= 0) & ~is_active)
    # Whether the slot that would be pruned next is offered, slots in the order of pruning.
    offered = torch.zeros(total + 1, dtype=torch.bool, device=rank.device)
    offered.scatter_(0, torch.where(is_active, rank.index_select(0, slots), total), True)
    pruned = torch.arange(1, total + 1, device=rank.device) - slots_of.starts
    fits = slots_of.of_owner(inactive) + slots_of.places(offered[:total]) >= pruned
    return slots_of.count(fits & (pruned <= slots_of.of_owner(most)))


@dataclass(frozen=True)
class Moves:
    """What a close does to the slots of several matrices, joined.

    Attributes:
        entries: the slots, by matrix.
        incoming: int64 keys ``[entries]`` of the positions that come in, negative where a slot stays.
        keys: int64 keys ``[entries]`` after the close, ascending.
        order: int64 ``[entries]``: the slot before the close from which each slot is taken.
    """

    entries: Joined
    incoming: Tensor
    keys: Tensor
    order: Tensor

    @classmethod
    def of(cls, index_sets: Sequence[Tensor], incoming: Sequence[Tensor]) -> Moves:
        """The moves of exchanges, ``incoming`` ``[k]`` for each index set ``[k]``."""
        entries = Joined([indices.numel() for indices in index_sets], index_sets[0].device)
        arriving = entries.keys(entries.join(incoming))
        keys = torch.where(arriving < 0, entries.keys(entries.join(index_sets)), arriving)
        order = sorted_order(keys)
        return cls(entries, arriving, keys.index_select(0, order), order)

    @cached_property
    def grown(self) -> Tensor:
        """bool ``[entries]``: whether another position comes into a slot, slots as before the close."""
        return self.incoming >= 0

    def indices(self, dtype: torch.dtype) -> list[Tensor]:
        """The index sets after the close."""
        return self.entries.split(self.entries.positions(self.keys).to(dtype))

    def apply(self, before: Tensor, grown: Tensor | float) -> Tensor:
        """Entries after the close: those of a slot that stays move with it, those of another are ``grown``.

        Args:
            before: ``[entries]``, slots as before the close.
            grown: ``[entries]``, likewise, or a number.
        """
        if isinstance(grown, Tensor):
            grown = grown.to(before.dtype)
        return torch.where(self.grown, grown, before).index_select(0, self.order)

    def moved(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Entries ``[k]`` of each matrix after the close, zero where a position has come in."""
        return self.entries.split(self.apply(self.entries.join(tensors), 0.0))

    def to(self, device: torch.device) -> Moves:
        """The moves on another device, as state that is kept there needs them."""
        if self.keys.device == device:
            return self
        moved = [tensor.to(device) for tensor in (self.incoming, self.keys, self.order)]
        return Moves(Joined(self.entries.sizes, device), *moved)

    def single(self, number: int) -> Moves:
        """The moves of one matrix."""
        if self.entries.single:
            return self
        part = self.entries.slice(number)
        entries = Joined([self.entries.sizes[number]], self.entries.device)
        incoming = self.incoming[part]
        incoming = torch.where(incoming < 0, incoming, self.entries.positions(incoming))
        return Moves(entries, incoming, self.entries.positions(self.keys[part]), self.order[part] - part.start)


def look_up(moves: Moves, sorted_keys: Tensor, columns: Sequence[Tensor], missing: float) -> list[Tensor]:
    """Read, for every slot into which a position comes, entries that belong to that position.

    Args:
        moves: of a close.
        sorted_keys: int64 ``[c]`` keys of the matrices of `moves`.
        columns: ``[c]`` each, floating, what belongs to these keys.
        missing: for slots that stay and for positions without a key.

    Returns:
        ``[entries]`` for each column.
    """
    outs = [column.new_full(moves.incoming.shape, missing) for column in columns]
    if not sorted_keys.numel():
        return outs
    if on_host(sorted_keys):
        slots = true_slots(moves.grown)
        wanted = moves.incoming.index_select(0, slots)
        found = _search_sorted(sorted_keys, wanted)
        hit = true_slots(sorted_keys.index_select(0, found) == wanted)
        slots, found = slots.index_select(0, hit), found.index_select(0, hit)
        return [out.index_copy_(0, slots, column[found]) for out, column in zip(outs, columns, strict=True)]
    found = _search_sorted(sorted_keys, moves.incoming)
    hit = sorted_keys.index_select(0, found) == moves.incoming
    return [torch.where(hit, column.index_select(0, found), missing) for column in columns]
