"""Everything that needs a GPU, in two parts of a few minutes: `one` is what tells most, `two` is the rest.

A part has one result file, gpu_<part>.json, which is complete after every measurement. Measurements that fail, and
those for which no time is left, are named in it. At the end a table is printed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

import torch

from ..environment import add_output_argument
from ..timing import Clock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("part", choices=("one", "two"))
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU, to try the benchmark itself")
    add_output_argument(parser)


def worker_command(part: str, folder: Path, rehearsal: bool, seconds: float) -> list[str]:
    """The command line of a process that measures what has not begun; see `worker`."""
    settings = {"part": part, "folder": str(folder.resolve()), "rehearsal": rehearsal, "seconds": seconds}
    return [sys.executable, "-m", "benchmarks.gpu.worker", json.dumps(settings)]


def run(args: argparse.Namespace) -> None:
    # Imported here, so that the process of the tests starts without the libraries that measurements need.
    from .measurements import PARTS
    from .running import Record, supervise
    from .table import gpu_table

    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit("no GPU found; to try the benchmark itself on a CPU: --rehearse")
    # What ends this process ends its workers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    part = PARTS[args.part]
    record = Record(args.output, part, args.rehearse)
    supervise(
        record, Clock(part.seconds), lambda seconds: worker_command(args.part, args.output, args.rehearse, seconds)
    )
    print(gpu_table(record.entries()))
