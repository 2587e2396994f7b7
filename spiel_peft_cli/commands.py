"""Registers functions as commands, with the flags, the help and the exit codes that all commands have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import name_options
from .output import Output

# Exit codes; docs/command-line.md lists them.
OK = 0
FINDINGS = 1
USAGE = 2
BAD_INPUT = 3
NOT_WRITTEN = 4
NOT_INSTALLED = 5
INTERNAL = 70
INTERRUPTED = 130

# Parts of the messages with which torch.save fails to write, as a plain RuntimeError.
_OF_TORCH = ("PytorchStreamWriter failed writing", "iostream error")

# The flags that every command has.
_JSON = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, also for errors.")]
_DEBUG = Annotated[bool, typer.Option("--debug", help="Show tracebacks and all warnings.")]

app = typer.Typer(
    name="spiel-peft",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        try:
            found = metadata.version("spiel-peft")
        except metadata.PackageNotFoundError:  # a checkout on the path
            found = "(not installed)"
        typer.echo(f"spiel-peft {found}")
        raise typer.Exit()


@app.callback()
def everything(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Inspect, merge, extract, combine, convert, validate and train SpIEL adapters."""


class NotWrittenError(OSError):
    """A result could not be written."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Add the folder to errors of the disk that name no file, and turn those of safetensors and torch into OSErrors."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise
    except Exception as error:
        text = str(error)
        of_safetensors = type(error).__name__ == "SafetensorError" and ("os error" in text or "IoError" in text)
        if of_safetensors or (isinstance(error, RuntimeError) and any(part in text for part in _OF_TORCH)):
            raise NotWrittenError(f"{folder} could not be written: {text}") from error
        raise


def command(example: str) -> Callable[[Callable[..., int | None]], Callable[..., int]]:
    """Register a function as a command.

    The function is called with an `Output` and its own options. It returns an exit code, or None for 0.

    Args:
        example: a command line that works, shown at the end of the help.
    """

    def register(function: Callable[..., int | None]) -> Callable[..., int]:
        signature = inspect.signature(function, eval_str=True)
        own = list(signature.parameters.values())[1:]
        kind = inspect.Parameter.KEYWORD_ONLY
        options = dict(_option(parameter) for parameter in own)
        flags = [
            inspect.Parameter("json", kind, default=False, annotation=_JSON),
            inspect.Parameter("debug", kind, default=False, annotation=_DEBUG),
        ]

        def run(*, json: bool, debug: bool, **values: Any) -> int:
            output = Output(json, debug)
            with output.in_charge():
                try:
                    return function(output, **values) or OK
                except KeyboardInterrupt:
                    raise typer.Abort() from None  # typer would end without a message
                except (ValueError, FileExistsError, FileNotFoundError) as error:
                    if len(error.args) == 1 and isinstance(error.args[0], str):
                        error.args = (name_options(error.args[0], options),)
                    raise

        run.__doc__ = function.__doc__
        parameters = [parameter.replace(kind=kind) for parameter in own] + flags
        run.__signature__ = signature.replace(parameters=parameters, return_annotation=int)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(function.__name__, epilog=f"Example: {example}")(run)
        return run

    return register


def _option(parameter: inspect.Parameter) -> tuple[str, bool]:
    """The name of an option or argument on the command line, and whether it is a flag without a value."""
    annotation = parameter.annotation
    info = annotation.__metadata__[0]
    declared = [name for name in (getattr(info, "default", None), *(info.param_decls or ())) if isinstance(name, str)]
    longest = max(declared, key=len, default=info.metavar or parameter.name)
    return longest, annotation.__origin__ is bool


def refuse_inputs(out: Path, name: str, **inputs: Any) -> None:
    """Refuse an output folder that is, holds or lies in what the command reads, before anything is read.

    Args:
        out: the output folder.
        name: the option that gives it.
        inputs: what is read, by the name of its option without dashes, or of its argument in capitals.
    """
    from spiel_peft.files.folder import refuse_inputs as refuse

    labels = {key if key.isupper() else f"--{key.replace('_', '-')}": path for key, path in inputs.items()}
    refuse(out, labels, name)
