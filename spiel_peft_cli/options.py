"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of a SpIEL adapter.", show_default=False)]
Adapters = Annotated[
    list[Path], typer.Argument(metavar="ADAPTER", help="Folders of SpIEL adapters.", show_default=False)
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to make.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
ShapesBase = Annotated[
    Path | None,
    typer.Option("--base", help="Checkpoint folder of the base model, or a folder with its config.json."),
]
Base = Annotated[Path, typer.Option("--base", help="Checkpoint folder of the base model.", show_default=False)]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target-module", help="Name or end of a name; may be given several times."),
]
BudgetR = Annotated[
    int | None, typer.Option("--r", min=1, help="Budget: as many deltas per module as LoRA of this rank has values.")
]
BudgetDensity = Annotated[
    float | None, typer.Option("--density", help="Budget: share of each weight, above 0 and at most 1.")
]
BudgetCount = Annotated[int | None, typer.Option("--num-deltas", min=1, help="Budget: deltas in all modules together.")]


def one_budget(r: int | None, density: float | None, num_deltas: int | None, needed: bool = True) -> None:
    """Refuse a command line with several budgets, or with none where one is needed."""
    given = [r, density, num_deltas].count(None)
    if given < 2 or (given == 3 and needed):
        raise typer.BadParameter("give exactly one of --r, --density and --num-deltas")


def one_each(weights: list[float] | None, count: int) -> list[float]:
    """The weights given, one for each adapter, or 1 for all if none were given."""
    if not weights:
        return [1.0] * count
    if len(weights) != count:
        raise typer.BadParameter(f"give one --weight for each of the {count} adapters, or none; got {len(weights)}")
    return list(weights)


def refuse_twice(adapters: list[Path]) -> None:
    """Refuse a command line that names an adapter twice."""
    if len(set(adapters)) < len(adapters):
        raise typer.BadParameter("the same adapter is given twice")
