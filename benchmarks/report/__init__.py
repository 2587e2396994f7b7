"""The page benchmarks/RESULTS.md, its plots, and the tables in README.md, made from benchmarks/results.

README.md holds a table between `<!-- benchmarks: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from ..environment import RESULTS, add_output_argument
from ..tables import Results, alone_table
from .page import results_page
from .plots import draw_all

PAGE = Path(__file__).parents[1] / "RESULTS.md"
README = Path(__file__).parents[2] / "README.md"
README_TABLES: dict[str, Callable[[Results], str]] = {"alone": alone_table}
_MARKED = re.compile(r"(<!-- benchmarks: (\w+) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    parser.add_argument("--readme", type=Path, default=README, help="the file whose tables are renewed")
    parser.add_argument("--no-plots", action="store_true")
    add_output_argument(parser)


def with_tables(text: str, results: Results) -> str:
    """Replace the table at every marked place of a text.

    Raises:
        ValueError: no table has the name at a marked place.
    """

    def renewed(match: re.Match[str]) -> str:
        if match[2] not in README_TABLES:
            raise ValueError(f"no table is called {match[2]!r}; there are {', '.join(README_TABLES)}")
        table = README_TABLES[match[2]](results)
        return f"{match[1]}\n{table}\n\n{match[4]}" if table else match[1] + match[4]

    return _MARKED.sub(renewed, text)


def run(args: argparse.Namespace) -> None:
    results = Results(args.output)
    args.page.write_text(results_page(results), encoding="utf-8")
    print(args.page)
    if args.readme.is_file():
        args.readme.write_text(with_tables(args.readme.read_text(encoding="utf-8"), results), encoding="utf-8")
        print(args.readme)
    if not args.no_plots:
        plots = RESULTS / "plots" if args.output == RESULTS else args.output / "plots"
        for path in draw_all(results, plots):
            print(path)
