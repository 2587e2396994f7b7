"""The recorded runs on two ranks, in processes of their own; see `support.ranks`."""

from __future__ import annotations

from functools import partial
from typing import Any

from support.ranks import run_here
from torch.nn.parallel import DistributedDataParallel

from recorded.models import RUNS, run


def on_two_ranks(name: str, rank: int) -> dict[str, Any]:
    return run(name, rank, DistributedDataParallel)


SCENARIOS = {name: partial(on_two_ranks, name) for name in RUNS}

if __name__ == "__main__":
    run_here(SCENARIOS, ranks=2)
