"""One decision for all data-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def agree_on_proposals(proposed: Tensor) -> Tensor:
    """Rank 0's proposals on every rank; without a process group, the tensor itself.

    Each rank sees gradients of its own data only. Ranks that chose from these would end up with different indices,
    which a data-parallel wrapper then hides by broadcasting rank 0's buffers.
    """
    if not _several_ranks():
        return proposed
    size = torch.tensor([proposed.numel()], device=proposed.device)
    torch.distributed.broadcast(size, 0)
    if torch.distributed.get_rank() != 0:
        proposed = torch.empty(int(size), dtype=torch.int64, device=proposed.device)
    torch.distributed.broadcast(proposed, 0)
    return proposed


def agree_on_values(values: Tensor) -> Tensor:
    """Rank 0's values, of which every rank has as many; seeds of one rank's own would let optimizer states drift."""
    if _several_ranks():
        torch.distributed.broadcast(values, 0)
    return values


def _several_ranks() -> bool:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    return torch.distributed.get_world_size() > 1
