"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Mapping
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


# Arguments of the functions that the commands call, and fields of configs, where they differ from the options' names.
_ARGUMENTS = {
    "adapter_dir": "ADAPTER",
    "base_dir": "--base",
    "check_base": "--any-base",
    "combination_type": "--type",
    "exclude_modules": "--exclude-module",
    "kind": "--from",
    "majority_sign_method": "--majority-sign",
    "out_dir": "--out",
    "others": "--drop-others",
    "quantization_config": "--trained-on",
    "target_modules": "--target-module",
    "weights": "--weight",
}
_VALUE = r"""=(?:True|False|'[^']*'|"[^"]*"|[^\s,;.()]+)?"""


def name_options(text: str, options: Mapping[str, bool]) -> str:
    """An error's text with the options of a command in place of the arguments of the functions that it calls.

    An argument is recognized in backticks, before "=", at the beginning of the text, and anywhere if its name is no
    plain word. What follows the name of a JSON file is left alone: it is about a field in that file.

    Args:
        text: the error's text.
        options: the command's options, such as "--density", and whether they are flags without a value.
    """
    if text.startswith("--"):
        return text  # it names the option already, and may go on about fields of the option's file
    about_us, json_file, about_a_file = text.partition(".json")
    arguments = {option.removeprefix("--").replace("-", "_"): option for option in options}
    arguments |= {argument: option for argument, option in _ARGUMENTS.items() if option in options}
    for argument, option in arguments.items():
        anywhere = "_" in argument or argument == "density"
        word = rf"(?<![\w./'`-]){argument}(?![\w/'-]|\.\w)" if anywhere else rf"^{argument}(?=[ :])"
        about_us = re.sub(rf"`{argument}`|\['{argument}'\]", option, about_us)
        flag = options[option]
        pattern = rf"(?<![\w./'-]){argument}({_VALUE})"
        about_us = re.sub(pattern, lambda found, option=option, flag=flag: _given(option, flag, found[1]), about_us)
        about_us = re.sub(word, option, about_us)
    about_us = about_us.replace("pass no --", "leave out --")
    if "--overwrite" in options:
        about_us = about_us.replace("allow overwriting", "give --overwrite")
    return about_us + json_file + about_a_file


def _given(option: str, flag: bool, value: str) -> str:
    """An option with the value that a text gives to its argument, as in "density=0.5"."""
    value = value.removeprefix("=").strip("'\"")
    if value and not flag:
        return f"{option} {value}"
    # The only negated flag, --any-base, stands for check_base=False.
    return f"no {option}" if value == "False" and option != "--any-base" else option
