"""`merge`, `extract`, `combine` and `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import tables
from .commands import OK, command, refuse_inputs, writing
from .options import (
    Adapters,
    Base,
    BudgetCount,
    BudgetDensity,
    BudgetR,
    Out,
    Overwrite,
    Targets,
    one_budget,
    one_each,
    refuse_twice,
)
from .output import Output

Weights = Annotated[
    list[float] | None,
    typer.Option("--weight", help="One for each adapter, in their order, negative ones too. 1 by default."),
]
QUANTIZATIONS = ("nf4", "fp4", "int8")
FORMATS = ("spiel", "shira", "sparse-patch", "dense-diff")


@command("spiel-peft merge adapter --base base --out merged --dtype float32")
def merge(
    output: Output,
    adapters: Adapters,
    base: Base,
    out: Out,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, bfloat16 or float16 for all weights. By default as in the base."),
    ] = None,
    weight: Weights = None,
    trained_on: Annotated[
        str | None,
        typer.Option(
            "--trained-on",
            help=f"{', '.join(QUANTIZATIONS)}: merge into the values that this quantization of the base stands for, "
            "which training saw.",
        ),
    ] = None,
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="With --trained-on: scales were quantized too.")
    ] = False,
    load_dtype: Annotated[
        str | None, typer.Option("--load-dtype", help="With --trained-on: dtype the base was loaded in for training.")
    ] = None,
    overwrite: Overwrite = False,
) -> int:
    """Merge adapters into a full-precision checkpoint, shard by shard, and say what rounding lost."""
    if trained_on is None and (double_quant or load_dtype):
        raise typer.BadParameter("--double-quant and --load-dtype go with --trained-on")
    if trained_on is not None and trained_on not in QUANTIZATIONS:
        raise typer.BadParameter(f"--trained-on must be one of {', '.join(QUANTIZATIONS)}, got {trained_on!r}")
    weights = one_each(weight, len(adapters))
    refuse_inputs(out, "--out", ADAPTER=adapters, base=base)
    from spiel_peft.files.merge import merge_adapter_into_checkpoint

    quantization = None if trained_on is None else _quantization(trained_on, double_quant)
    with writing(out), output.progress("Merging") as progress:
        report = merge_adapter_into_checkpoint(
            base,
            adapters,
            out,
            dtype,
            weights=weights,
            quantization_config=quantization,
            load_dtype=load_dtype,
            overwrite=overwrite,
            progress=progress,
        )
    data = {
        "folder": report.folder,
        "dtypes": report.dtypes,
        "deltas": report.loss.total,
        "lost": report.loss.lost,
        "lost_share": report.loss.share,
        "untied": report.untied,
        "modules": {module: {"deltas": loss.total, "lost": loss.lost} for module, loss in report.modules.items()},
    }
    output.result(data, lambda console: tables.show_merge(console, report))
    return OK


def _quantization(kind: str, double_quant: bool) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double_quant)


@command("spiel-peft extract --base base --finetuned finetuned --density 0.05 --out extracted")
def extract(
    output: Output,
    base: Base,
    finetuned: Annotated[
        Path, typer.Option("--finetuned", help="Checkpoint of the same model after fine-tuning.", show_default=False)
    ],
    out: Out,
    r: BudgetR = None,
    density: BudgetDensity = None,
    num_deltas: BudgetCount = None,
    scope: Annotated[
        str, typer.Option("--scope", help="module: each weight keeps its own largest changes; global: the largest.")
    ] = "module",
    target_module: Targets = None,
    exclude_module: Annotated[
        list[str] | None, typer.Option("--exclude-module", help="Name or end of a name; may be given several times.")
    ] = None,
    rewind: Annotated[
        bool, typer.Option("--rewind", help="Keep positions, set values to zero: a lottery ticket to retrain.")
    ] = False,
    norms_and_biases: Annotated[
        bool, typer.Option("--norms-and-biases", help="Save changed norms and biases too, in full.")
    ] = False,
    overwrite: Overwrite = False,
) -> int:
    """Cut a sparse adapter of the largest changes out of a fine-tuned checkpoint."""
    one_budget(r, density, num_deltas)
    refuse_inputs(out, "--out", base=base, finetuned=finetuned)
    from spiel_peft.files.extract import extract_delta

    with writing(out), output.progress("Comparing") as progress:
        found = extract_delta(
            base,
            finetuned,
            out,
            density=density,
            num_deltas=num_deltas,
            r=r,
            scope=scope,  # type: ignore[arg-type]
            target_modules=_targets(target_module),
            exclude_modules=exclude_module or None,
            rewind=rewind,
            norms_and_biases=norms_and_biases,
            overwrite=overwrite,
            progress=progress,
        )
    data = {
        "folder": out,
        "deltas": sum(found.counts.values()),
        "kept": found.kept,
        "modules": found.counts,
        "left_out": found.left_out,
    }
    output.result(data, lambda console: tables.show_extraction(console, out, found))
    return OK


def _targets(names: list[str] | None) -> Any:
    return "all-linear" if names == ["all-linear"] else names or None


@command("spiel-peft combine language task --weight 1 --weight -0.5 --out combined")
def combine(
    output: Output,
    adapters: Adapters,
    out: Out,
    weight: Weights = None,
    combination: Annotated[
        str,
        typer.Option("--type", help="linear, magnitude_prune, ties, dare_linear or dare_ties."),
    ] = "linear",
    density: Annotated[
        float | None, typer.Option("--density", help="Share of each adapter's deltas to keep; not for linear.")
    ] = None,
    majority_sign: Annotated[
        str, typer.Option("--majority-sign", help="With ties: total (sign of the sum) or frequency.")
    ] = "total",
    seed: Annotated[int, typer.Option("--seed", min=0, help="With dare: of the random choices.")] = 0,
    drop_zeros: Annotated[bool, typer.Option("--drop-zeros", help="Leave out entries that cancel to zero.")] = False,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Combine adapters that name different base models.")
    ] = False,
    overwrite: Overwrite = False,
) -> int:
    """Combine adapters into one, with weights."""
    refuse_twice(adapters)
    weights = one_each(weight, len(adapters))
    refuse_inputs(out, "--out", ADAPTER=adapters)
    from spiel_peft.compose.combine import combine_adapters
    from spiel_peft.compose.overlap import overlap_of_files
    from spiel_peft.files.adapter_file import read_adapter, write_adapter
    from spiel_peft.files.folder import refuse_existing

    refuse_existing(out, overwrite)
    names = [str(folder) for folder in adapters]
    files = [read_adapter(folder) for folder in adapters]
    with output.progress("Combining") as progress:
        combined = combine_adapters(
            files,
            weights,
            combination,
            density,
            majority_sign,
            seed=seed,
            drop_zeros=drop_zeros,
            names=names,
            check_base=not any_base,
            progress=progress,
        )
    with writing(out):
        write_adapter(combined, out, overwrite)
    overlap = overlap_of_files(dict(zip(names, files, strict=True)))
    data = {
        "folder": out,
        "deltas": sum(delta.k for delta in combined.deltas.values()),
        "modules": {module: delta.k for module, delta in combined.deltas.items()},
        "overlap": {**vars(overlap.total), "fraction": overlap.total.fraction},
    }
    output.result(data, lambda console: tables.show_combination(console, out, data["deltas"], overlap))
    return OK


@command("spiel-peft convert their_adapter --base base --out my_adapter")
def convert(
    output: Output,
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Adapter folder, or a pytorch_diff.bin.", show_default=False)
    ],
    out: Out,
    to: Annotated[str, typer.Option("--to", help=f"One of {', '.join(FORMATS)}.")] = "spiel",
    kind: Annotated[
        str | None,
        typer.Option("--from", help="composable-sft, sft, shira or supertuning. Found out by default."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="Checkpoint folder of the base model; needed for most formats.")
    ] = None,
    r: Annotated[int | None, typer.Option("--r", min=1, help="With --to shira: its r, by default the least.")] = None,
    drop_others: Annotated[
        bool, typer.Option("--drop-others", help="From composable-sft: leave out what is no sparse matrix.")
    ] = False,
    task_type: Annotated[
        str | None, typer.Option("--task-type", help="From composable-sft: for the config, such as SEQ_CLS.")
    ] = None,
    overwrite: Overwrite = False,
) -> int:
    """Convert adapters of other methods into SpIEL adapters, and SpIEL adapters into what others read."""
    if to not in FORMATS:
        raise typer.BadParameter(f"--to must be one of {', '.join(FORMATS)}, got {to!r}")
    refuse_inputs(out, "--out", SOURCE=source, base=base)
    options: dict[str, Any] = {"others": "drop"} if drop_others else {}
    options |= {"task_type": task_type} if task_type else {}
    if to == "spiel":
        if r is not None:
            raise typer.BadParameter("--r goes with --to shira")
        result = _convert_in(output, source, out, base, kind, overwrite, options)
    else:
        if options or kind:
            raise typer.BadParameter("--from, --drop-others and --task-type go with --to spiel")
        if base is None:
            raise typer.BadParameter(f"--to {to} needs --base")
        if r is not None and to != "shira":
            raise typer.BadParameter("--r goes with --to shira")
        result = _convert_out(output, source, out, base, to, {"r": r} if r else {}, overwrite)
    output.result({"folder": out, **vars(result)}, lambda console: tables.show_conversion(console, out, result))
    return OK


def _convert_in(
    output: Output,
    source: Path,
    out: Path,
    base: Path | None,
    kind: str | None,
    overwrite: bool,
    options: dict[str, Any],
) -> Any:
    from spiel_peft.convert import convert_adapter
    from spiel_peft.files.folder import refuse_existing

    refuse_existing(out, overwrite)
    with writing(out), output.progress("Converting") as progress:
        return convert_adapter(source, out, base, kind, overwrite=overwrite, progress=progress, **options)


def _convert_out(
    output: Output, source: Path, out: Path, base: Path, to: str, options: dict[str, Any], overwrite: bool
) -> Any:
    from spiel_peft.convert import export_dense_diff, export_shira, export_sparse_patch
    from spiel_peft.files.folder import refuse_existing

    refuse_existing(out, overwrite)
    exporters = {"shira": export_shira, "sparse-patch": export_sparse_patch, "dense-diff": export_dense_diff}
    with writing(out), output.progress("Converting") as progress:
        return exporters[to](source, out, base, overwrite=overwrite, progress=progress, **options)
