"""PEFT's own benchmark, method_comparison/MetaMathQA, with this package.

Puts the experiments (all, or those that are named) into the harness's folder, runs one after the other in a process of
its own, and prints a table of their results beside those of LoRA and SHiRA that come with the harness.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import harness, rehearsal
from .harness import Harness

OLDEST_PYTHON = (3, 12)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"experiments, of {', '.join(harness.names())}")
    parser.add_argument(
        "--harness", type=Path, required=True, help="the folder method_comparison/MetaMathQA of a checkout of PEFT"
    )
    parser.add_argument("--again", action="store_true", help="also run experiments that have a result")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run the harness's code for a few steps on a CPU, with a tiny model and made-up data, in a copy",
    )


def run(args: argparse.Namespace) -> None:
    names = args.names or harness.names()
    unknown = sorted(set(names) - set(harness.names()))
    if unknown:
        raise SystemExit(f"NAME must be one of {', '.join(harness.names())}, got {', '.join(unknown)}")
    try:
        found = Harness.at(args.harness)
        if args.rehearse:
            with tempfile.TemporaryDirectory() as folder:
                found = rehearsal.copy(found, Path(folder))
                without_result = _run_all(found, names, args.again)
                rehearsal.check_adapters(found, len(names) - len(without_result))
        elif sys.version_info < OLDEST_PYTHON:
            raise ValueError("the harness needs Python 3.12 to save adapters and to tell the size of their files")
        else:
            without_result = _run_all(found, names, args.again)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if without_result:
        raise SystemExit(f"no result of {', '.join(without_result)}; the output above says why")


def _run_all(found: Harness, names: Sequence[str], again: bool) -> list[str]:
    """Run experiments and print the table. Returns the names of those that ended without a result."""
    found.place(names)
    without_result = []
    for name in names:
        if found.result(name) and not again:
            print(f"{name} has a result; to run it once more: --again", flush=True)
            continue
        print(f"{name} begins", flush=True)
        if not found.run(name):
            without_result.append(name)
    results = [result for name in harness.names() if (result := found.result(name))]
    print(harness.table([*results, *found.compared()]))
    return without_result
