"""The command line ``python -m benchmarks COMMAND``."""

from __future__ import annotations

import argparse

from . import gpu, memory, ops, overlap, peft_metamathqa, plan, profile, quality, report, scaling, step
from .gpu import compiled


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure SpIEL against PEFT's LoRA in one process; results are kept as JSON in benchmarks/results.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (step, memory, ops, scaling, gpu, compiled, profile, overlap, quality, peft_metamathqa, plan, report):
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(
            name,
            help=str(module.__doc__).splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
