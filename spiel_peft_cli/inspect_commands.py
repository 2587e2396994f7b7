"""`info`, `plot` and `validate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import tables
from .commands import FINDINGS, OK, command, refuse_inputs, writing
from .options import Adapter, Adapters, Overwrite, ShapesBase, refuse_twice
from .output import Output

if TYPE_CHECKING:
    from spiel_peft.compose.overlap import Overlap, OverlapReport
    from spiel_peft.inspection.facts import AdapterFacts

KINDS = ("density", "histogram", "matrix", "churn", "loss")


@command("spiel-peft info adapter other_adapter --base base")
def info(
    output: Output,
    adapters: Adapters,
    base: ShapesBase = None,
    summary: Annotated[bool, typer.Option("--summary", help="Leave out the table of modules.")] = False,
) -> int:
    """Show what adapters hold: budget, settings, deltas, density and norms by module, and how they overlap.

    Without --base, shapes are known only of adapters that were saved in training.
    """
    from spiel_peft.compose.overlap import overlap_of_files
    from spiel_peft.files.checkpoint import open_base
    from spiel_peft.inspection.facts import adapter_facts

    refuse_twice(adapters)
    opened = None if base is None else open_base(base)
    facts = [adapter_facts(folder, opened) for folder in adapters]
    report = overlap_of_files({str(f.folder): f.adapter for f in facts}) if len(facts) > 1 else None
    data = {
        "adapters": [_facts_data(f) for f in facts],
        "overlap": None if report is None else _overlap_data(report),
    }
    output.result(data, lambda console: tables.show_info(console, facts, report, summary))
    return OK


def _facts_data(facts: AdapterFacts) -> dict[str, Any]:
    return {
        "folder": facts.folder,
        "budget": facts.budget,
        "settings": facts.settings,
        "deltas": facts.deltas,
        "weights": facts.weights,
        "density": facts.density,
        "norm": facts.norm,
        "mean_abs": facts.mean_abs,
        "max_abs": facts.max_abs,
        "file_bytes": facts.file_bytes,
        "training": None if facts.training is None else vars(facts.training),
        "saved_in_full": {key: list(tensor.shape) for key, tensor in facts.adapter.others.items()},
        "modules": [{**vars(module), "density": module.density} for module in facts.modules],
    }


def _overlap_data(report: OverlapReport) -> dict[str, Any]:
    from spiel_peft.inspection.facts import by_number

    def counts(found: Overlap) -> dict[str, Any]:
        return {**vars(found), "fraction": found.fraction}

    return {
        "adapters": report.adapters,
        "total": counts(report.total),
        "pairs": [{"adapters": pair, **counts(found)} for pair, found in report.pairs.items()],
        "modules": {module: counts(report.modules[module]) for module in sorted(report.modules, key=by_number)},
    }


@command("spiel-peft plot adapter --out plots --base base")
def plot(
    output: Output,
    adapter: Adapter,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNG files.", show_default=False)],
    base: ShapesBase = None,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", help=f"One of {', '.join(KINDS)}; may be given several times. All by default."),
    ] = None,
    module: Annotated[
        str | None, typer.Option("--module", help="Of the map: name or end of it. By default the one that moved most.")
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option("--log", help="trainer_state.json for churn and loss. By default looked for beside the adapter."),
    ] = None,
    overwrite: Overwrite = False,
) -> int:
    """Draw an adapter: density by layer and module, sizes of deltas, a map of one matrix; churn and loss if logged."""
    for name in kind or ():
        if name not in KINDS:
            raise typer.BadParameter(f"--kind must be one of {', '.join(KINDS)}, got {name!r}")
    refuse_inputs(out, "--out", ADAPTER=adapter, base=base, log=log)
    try:
        from spiel_peft.inspection import plots
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ImportError("plot needs matplotlib: pip install 'spiel-peft[plot]'") from error
    from spiel_peft.inspection.facts import adapter_facts

    facts = adapter_facts(adapter, base)
    if not facts.deltas:
        raise ValueError(f"{adapter} holds no deltas, so there is nothing to draw")
    figures = _figures(output, plots, facts, kind, module, log)
    with writing(out), output.progress("Drawing") as progress:
        files = plots.save_figures(figures, out, overwrite, progress)
    output.result({"files": files}, lambda console: tables.show_files(console, files))
    return OK


def _figures(
    output: Output, plots: Any, facts: AdapterFacts, kind: list[str] | None, module: str | None, log: Path | None
) -> dict[str, Any]:
    """Functions that draw the pictures, by name. A picture not asked for by name is left out if it cannot be drawn."""
    from spiel_peft.inspection.facts import find_log, read_closes, read_losses

    figures: dict[str, Any] = {}
    wanted = dict.fromkeys(kind or KINDS)
    if "density" in wanted:
        figures["density"] = lambda: plots.density_figure(facts)
    if "histogram" in wanted:
        figures["histogram"] = lambda: plots.histogram_figure(facts)
    if "matrix" in wanted:
        chosen = plots.find_module(facts, module)
        if chosen.shape is None and not kind and module is None:
            output.warn("matrix is left out: the weights' shapes are not known, name the base model with --base")
        else:
            figures["matrix"] = lambda: plots.matrix_figure(chosen, facts.adapter.deltas[chosen.module])
    if wanted.keys() & {"churn", "loss"}:
        if not kind and log is None and find_log(facts.folder) is None:
            output.warn(f"churn and loss are left out: no log of closes in or beside {facts.folder}")
            return figures
        closes = read_closes(log or facts.folder)
        if "churn" in wanted:
            figures["churn"] = lambda: plots.churn_figure(closes)
        if "loss" in wanted:
            losses = read_losses(log or facts.folder)
            figures["loss"] = lambda: plots.loss_figure(losses, closes)
    return figures


@command("spiel-peft validate adapter --base base")
def validate(output: Output, adapters: Adapters, base: ShapesBase = None) -> int:
    """Check adapters as a whole; exit code 1 and a list of all problems if there are any.

    Checked: indices sorted, unique and in range; values finite; training state; a config that agrees. With --base also
    modules, shapes and the budget.
    """
    from spiel_peft.files.checkpoint import open_base
    from spiel_peft.inspection.validate import validate_adapter

    opened = None if base is None else open_base(base)
    found = {folder: validate_adapter(folder, opened) for folder in adapters}
    data = {
        "valid": not any(found.values()),
        "adapters": [
            {"folder": folder, "valid": not findings, "problems": [vars(finding) for finding in findings]}
            for folder, findings in found.items()
        ],
    }
    output.result(data, lambda console: tables.show_findings(console, found))
    return FINDINGS if any(found.values()) else OK
