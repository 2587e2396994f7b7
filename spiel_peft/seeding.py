"""Seeds that are the same on every process and Python version."""

from __future__ import annotations

import hashlib

import torch


def seeded_generator(seed: int, module_name: str, cycle: int) -> torch.Generator:
    """A CPU generator for one module and cycle.

    Python's own `hash` of a string changes from process to process, which would let ranks and resumed runs drift.

    Args:
        seed: the config's seed.
        module_name: full name of the adapted module.
        cycle: 0 for the initial positions, n for the n-th close.
    """
    digest = hashlib.blake2b(f"{seed}\0{module_name}\0{cycle}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
