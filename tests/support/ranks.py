"""Runs scenarios on several processes that are joined by gloo, and brings home what each of them saw.

A scenario is a function of its rank that returns anything `torch.save` takes. Scenarios of one file run one after the
other in the same processes: starting them takes longer than most scenarios.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Scenario = Callable[[int], Any]
# Long enough for a machine that does other things as well; a scenario that hangs is a failure.
PATIENCE = timedelta(seconds=30)


@dataclass
class Raised:
    """What a scenario returned if it raised."""

    kind: str
    message: str
    trace: str


def run_here(scenarios: dict[str, Scenario], ranks: int) -> None:
    """Call this under ``if __name__ == "__main__"``: runs all scenarios and saves what every rank returned."""
    # A process that has run autograd must not fork, which is why this is one of its own.
    torch.multiprocessing.start_processes(_run_rank, (scenarios, ranks, sys.argv[1]), nprocs=ranks, start_method="fork")


def launch(file: str, folder: Path, ranks: int) -> dict[str, list[Any]]:
    """Run a file's scenarios; for each of them what the ranks returned, a `Raised` where one raised."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, file, str(folder)], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    by_rank = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
    return {name: [results[name] for results in by_rank] for name in by_rank[0]}


def results_of(launched: dict[str, list[Any]], name: str) -> list[Any]:
    """What the ranks returned; fails if one of them raised."""
    for rank, result in enumerate(launched[name]):
        if isinstance(result, Raised):
            raise AssertionError(f"rank {rank} of {name!r} raised:\n{result.trace}")
    return launched[name]


def _run_rank(rank: int, scenarios: dict[str, Scenario], ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    # As torchrun sets them, for libraries that look there.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=PATIENCE)
    results: dict[str, Any] = {}
    apart = False
    for name, scenario in scenarios.items():
        torch.manual_seed(0)
        try:
            if apart:
                raise RuntimeError("an earlier scenario has left the ranks apart")
            results[name] = scenario(rank)
        except Exception as error:
            results[name] = Raised(type(error).__name__, str(error), traceback.format_exc())
        try:
            dist.barrier()
        except RuntimeError as error:
            apart = True
            results[name] = Raised("apart", str(error), getattr(results[name], "trace", "returned, but others did not"))
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
