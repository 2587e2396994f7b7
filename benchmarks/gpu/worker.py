"""The process that measures: ``python -m benchmarks.gpu.worker SETTINGS``, see `benchmarks.gpu.worker_command`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from spiel_kernels.workspace import release_workspaces

from ..stepping import free_memory
from ..timing import Clock
from .measurements import PARTS
from .running import DEVICE_LOST, Context, Record, work


def tidy_up() -> None:
    """Free what a measurement leaves behind, so that it does not count for the next one."""
    release_workspaces()
    free_memory()


def main(settings: str) -> None:
    chosen = json.loads(settings)
    rehearsal = chosen["rehearsal"]
    record = Record(Path(chosen["folder"]), PARTS[chosen["part"]], rehearsal)
    context = Context(torch.device("cpu" if rehearsal else "cuda"), rehearsal, Clock(chosen["seconds"]))
    if not work(record, context, tidy_up):
        # Not the usual end: a lost GPU may keep it from ever coming.
        sys.stdout.flush()
        os._exit(DEVICE_LOST)


if __name__ == "__main__":
    main(sys.argv[1])
