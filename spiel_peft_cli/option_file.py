"""The file of `train --config`: options of the command by name, beside fields that are passed on to TRL."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import typer

# Options that say how this one call prints, or name the file itself.
_NOT_IN_A_FILE = frozenset({"config", "json", "debug", "help"})


def use_option_file(context: typer.Context, path: Path | None) -> Path | None:
    """Take what a file says about the command's options as their defaults; the command line wins over them.

    It is the callback of an eager option, hence called before the other options are read.

    Raises:
        ValueError: the file cannot be read, or is not a YAML mapping.
    """
    if path is not None:
        parameters = {parameter.name: parameter for parameter in context.command.params}
        found = {name: value for name, value in read_yaml(path).items() if name in parameters and value is not None}
        context.default_map = {
            name: [value] if parameters[name].multiple and not isinstance(value, list) else value
            for name, value in found.items()
            if name not in _NOT_IN_A_FILE
        }
    return path


def other_fields(path: Path | None, options: Collection[str]) -> dict[str, Any]:
    """The entries of the file that are no options of the command.

    Args:
        path: the file of `--config`, if one was given.
        options: names of the command's options, with underscores.
    """
    if path is None:
        return {}
    return {name: value for name, value in read_yaml(path).items() if name not in set(options) - _NOT_IN_A_FILE}


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
