"""The file of `train --config`: options of the command by name, beside fields that are passed on to TRL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

# Options that say how this one call prints, or name the file itself.
_NOT_IN_A_FILE = frozenset({"config", "json", "debug", "help"})


@dataclass(frozen=True)
class OptionFile:
    """A file that was read: its path, and its entries that are no options of the command."""

    path: Path
    other_fields: dict[str, Any]


def use_option_file(context: typer.Context, path: Path | None) -> OptionFile | None:
    """Take what a file says about the command's options as their defaults; the command line wins over them.

    It is the callback of an eager option, hence called before the other options are read, and its result is the value
    of that option. The file is read once, so it can be a pipe.

    Raises:
        ValueError: the file cannot be read, or is not a YAML mapping.
    """
    if path is None:
        return None
    parameters = {parameter.name: parameter for parameter in context.command.params}
    options = parameters.keys() - _NOT_IN_A_FILE
    found = read_yaml(path)
    context.default_map = {
        name: [value] if parameters[name].multiple and not isinstance(value, list) else value
        for name, value in found.items()
        if name in options and value is not None
    }
    return OptionFile(path, {name: value for name, value in found.items() if name not in options})


def read_yaml(path: Path) -> Mapping[Any, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: the file cannot be read, or is not a YAML mapping; the message names --config and the file.
    """
    import yaml  # not needed, and maybe not installed, where there is no such file

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"--config {path}: expected lines of 'field: value', got {type(found).__name__}")
    return found
