"""Collective operations among the ranks that train a delta together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Elements per collective, unless a single tensor has more: small tensors are sent together to save latency, large ones
# alone to save copies.
BUCKET = 1 << 20


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
