"""Held-out quality of SpIEL beside LoRA, fixed sparse masks and full fine-tuning: a plan of runs, a queue, a report.

`run` works through the plan (plan.json) one cell after the other, on one thread; it can be killed and started again at
any time. `status` says what is left. `report` writes the tables, benchmarks/QUALITY.md, and the plots.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from . import queue
    from .report import PAGE

    actions = parser.add_subparsers(dest="action", required=True)
    running = actions.add_parser("run", help="run the next cells of the plan")
    running.add_argument("--tier", choices=("A", "B", "C"), help="only cells of this tier")
    running.add_argument("--hours", type=float, help="start no cell that would not be through by then")
    actions.add_parser("status", help="what is done, and how many hours are left")
    report = actions.add_parser("report", help="write tables and plots")
    report.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    for action in actions.choices.values():
        action.add_argument("--output", type=Path, default=queue.FOLDER, help="folder of the cells' results")


def run(args: argparse.Namespace) -> None:
    from . import plan, queue, report

    described = plan.load()
    if args.action == "status":
        print(queue.status(described, queue.read_results(args.output)))
    elif args.action == "report":
        for path in report.write(described, queue.read_results(args.output), args.page):
            print(path)
    else:
        # `kill` ends the queue as Ctrl-C does, and the cell in progress with it.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            failed = queue.work(args.output, described, args.tier, args.hours)
        except RuntimeError as error:
            sys.exit(str(error))
        if failed:
            sys.exit(f"{failed} cells failed; the next run tries them again")
