"""Prints the results of commands as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from spiel_peft.compose.overlap import OverlapReport
    from spiel_peft.convert import Conversion
    from spiel_peft.files.extract import Extraction
    from spiel_peft.finetune.run import RunResult
    from spiel_peft.inspection.facts import AdapterFacts
    from spiel_peft.inspection.validate import Finding
    from spiel_peft.weights.merge_report import MergeReport


def count(number: int, thing: str) -> str:
    """A number of things: "1 close", "2 closes"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def show_info(console: Console, facts: Sequence[AdapterFacts], overlap: OverlapReport | None, summary: bool) -> None:
    """Print the facts of each adapter, then how the adapters overlap."""
    for adapter in facts:
        console.print(f"[bold]{escape(str(adapter.folder))}[/bold]")
        for name, value in _summary(adapter).items():
            console.print(f"  {name:<10} {escape(value)}")
        if not summary:
            console.print(_modules(adapter))
    if overlap is not None:
        console.print(_pairs(overlap))


def _summary(facts: AdapterFacts) -> dict[str, str]:
    settings = facts.settings
    density = "" if facts.density is None else f", {facts.density:.3%} of {facts.weights:,} weights"
    found = {
        "base": str(settings["base_model_name_or_path"] or "not recorded"),
        "budget": ", ".join(f"{name}={value}" for name, value in facts.budget.items()),
        "growth": f"{settings['growth']}, every {count(settings['regrow_every'], 'step')}, "
        f"{settings['regrow_schedule']} from {settings['initial_regrow_rate']:g}",
        "deltas": f"{facts.deltas:,} in {count(len(facts.modules), 'module')}{density}",
        "sizes": f"norm {facts.norm:.4g}, mean |delta| {facts.mean_abs:.3g}, largest {facts.max_abs:.3g}",
        "file": f"{facts.file_bytes / 2**20:,.2f} MiB",
    }
    if facts.training is not None:
        total = f" of {facts.training.total_steps}" if facts.training.total_steps else ""
        found["training"] = (
            f"step {facts.training.step}{total}, {count(facts.training.closes, 'close')}; can be resumed"
        )
    if facts.adapter.others:
        found["in full"] = ", ".join(facts.adapter.others)
    return found


def _modules(facts: AdapterFacts) -> Table:
    table = Table(box=None, pad_edge=True, header_style="dim")
    table.add_column("module", overflow="fold")
    for title in ("shape", "deltas", "density", "norm", "mean |delta|", "largest"):
        table.add_column(title, justify="right", no_wrap=True)
    for module in facts.modules:
        table.add_row(
            escape(module.module),
            "?" if module.shape is None else "x".join(map(str, module.shape)),
            f"{module.deltas:,}",
            "?" if module.density is None else f"{module.density:.3%}",
            f"{module.norm:.4g}",
            f"{module.mean_abs:.3g}",
            f"{module.max_abs:.3g}",
        )
    return table


def _pairs(report: OverlapReport) -> Table:
    table = Table(title="Overlap", title_justify="left", box=None, header_style="dim")
    table.add_column("adapters", overflow="fold")
    for title in ("shared", "in either", "shared share", "opposite signs"):
        table.add_column(title, justify="right", no_wrap=True)
    rows: dict[Any, Any] = dict(report.pairs)
    if len(report.adapters) > 2:
        rows[("all",)] = report.total
    for names, found in rows.items():
        shared = (f"{found.shared:,}", f"{found.union:,}", f"{found.fraction:.2%}", f"{found.conflicts:,}")
        table.add_row(escape(", ".join(names)), *shared)
    return table


def show_files(console: Console, files: Sequence[Path]) -> None:
    """Print the files that were written, one per line."""
    for path in files:
        console.print(f"wrote {path}", markup=False)


def show_findings(console: Console, found: Mapping[Path, Sequence[Finding]]) -> None:
    """Print the problems of each adapter, one per line, or that it is sound."""
    for folder, findings in found.items():
        verdict = count(len(findings), "problem") if findings else "sound"
        console.print(f"{folder}: {verdict}", markup=False, style="red" if findings else "green")
        for finding in findings:
            console.print(f"  {finding}", markup=False)


def show_merge(console: Console, report: MergeReport) -> None:
    """Print where the merged checkpoint is, and how many deltas rounding lost."""
    loss = report.loss
    console.print(f"wrote {report.folder}", markup=False)
    dtypes = " and ".join(sorted(report.dtypes))
    console.print(f"rounding to {dtypes} lost {loss.lost:,} of {loss.total:,} deltas ({loss.share:.2%})", markup=False)
    if report.untied:
        console.print(f"no longer tied: {', '.join(report.untied)}", markup=False)


def show_extraction(console: Console, folder: Path, found: Extraction) -> None:
    """Print how much of the change the adapter holds, and what it leaves out."""
    console.print(f"wrote {folder}", markup=False)
    deltas = sum(found.counts.values())
    held = f"{count(deltas, 'delta')} in {count(len(found.counts), 'module')}"
    console.print(f"{held} hold {found.kept:.2%} of the squared change", markup=False)
    for name, reason in found.left_out.items():
        text = reason.replace("norms_and_biases=True", "--norms-and-biases")
        console.print(f"left out {name}: {text}", markup=False)


def show_combination(console: Console, folder: Path, deltas: int, overlap: OverlapReport) -> None:
    """Print the size of the combination, and how its parts overlap."""
    console.print(f"wrote {folder}", markup=False)
    console.print(f"{count(deltas, 'delta')}; of the adapters' {overlap}", markup=False)


def show_conversion(console: Console, folder: Path, result: Conversion) -> None:
    """Print what a conversion took over and what it left out."""
    console.print(f"wrote {folder}", markup=False)
    held = f"{count(result.num_deltas, 'delta')} in {count(len(result.modules), 'module')}"
    console.print(f"{result.kind}: {held}", markup=False)
    for title, names in (("kept in full", result.others), ("left out", result.dropped)):
        if names:
            console.print(f"{title}: {', '.join(names)}", markup=False)
    for note in result.notes:
        console.print(f"note: {note}", markup=False)


def show_run(console: Console, result: RunResult) -> None:
    """Print the losses of a training run, and where the adapter is."""
    share = result.deltas / result.weights if result.weights else 0.0
    resumed = f", resumed from {result.resumed_from}" if result.resumed_from is not None else ""
    steps = count(result.steps, "step")
    console.print(f"{count(result.deltas, 'delta')}, {share:.2%} of the base; {steps}{resumed}", markup=False)
    if result.blank or result.duplicates:
        console.print(f"left out of the data: {result.blank} blank, {result.duplicates} repeated", markup=False)
    if result.train_loss is None:
        console.print("the run was complete already, nothing was trained", markup=False)
    else:
        console.print(f"training loss {result.train_loss:.4f} on {count(result.examples, 'example')}", markup=False)
    if result.eval_loss is not None:
        before = "" if result.eval_loss_before is None else f"{result.eval_loss_before:.4f} before, "
        console.print(f"held-out loss {before}{result.eval_loss:.4f} after, on {count(result.held_out, 'example')}")
    for answer in result.answers:
        console.print()
        console.print(f"question  {answer.question}", markup=False)
        console.print(f"before    {' '.join(answer.before.split())}", markup=False)
        console.print(f"after     {' '.join(answer.after.split())}", markup=False)
    merged = f" and {result.merged}" if result.merged is not None else ""
    console.print()
    closes = count(result.closes, "close")
    console.print(f"{closes} of the cycle; wrote {result.adapter}{merged}", markup=False)
