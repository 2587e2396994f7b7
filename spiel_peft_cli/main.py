"""The entry point: runs a command, and turns an error into one line and an exit code."""

from __future__ import annotations

import errno
import io
import sys
import traceback
from collections.abc import Sequence

import typer

from . import file_commands, inspect_commands, train_command  # noqa: F401  registers commands
from .commands import BAD_INPUT, INTERNAL, INTERRUPTED, NOT_INSTALLED, NOT_WRITTEN, OK, USAGE, NotWrittenError, app
from .output import Output, visible

_UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.EEXIST,
    errno.EPIPE,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: the process's); returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    flags = arguments[: arguments.index("--")] if "--" in arguments else arguments
    output = Output(as_json="--json" in flags, debug="--debug" in flags)
    try:
        done = app(arguments or ["--help"], prog_name="spiel-peft", standalone_mode=False)
        return done or OK if arguments else USAGE
    except (KeyboardInterrupt, typer.Abort):
        return _report(output, "interrupted", "KeyboardInterrupt", INTERRUPTED)
    except Exception as error:
        if hasattr(error, "format_message"):  # wrong usage, in whichever version of click
            return _usage(output, error)
        if output.debug:
            print(visible(traceback.format_exc(), keep="\n"), file=sys.stderr, end="")
        code = _code(error)
        return _report(output, _message(error, code), type(error).__name__, code)


def _usage(output: Output, error: Exception) -> int:
    code = int(getattr(error, "exit_code", USAGE))
    message = error.format_message()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    if context is not None:
        message += f" (try '{context.command_path} --help')"
    return _report(output, message, "UsageError", code)


def _code(error: Exception) -> int:
    if isinstance(error, ImportError):
        return NOT_INSTALLED
    if isinstance(error, (FileExistsError, NotWrittenError)):
        return NOT_WRITTEN
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return NOT_WRITTEN
    if isinstance(error, (ValueError, OSError, OverflowError)) or _is_about_a_file(error):
        return BAD_INPUT
    return INTERNAL


def _is_about_a_file(error: Exception) -> bool:
    """Whether an error that is no ValueError says that a file is damaged."""
    if isinstance(error, RecursionError):
        return "JSON" in str(error)  # it is nested too deeply
    name = type(error).__name__
    return name in ("SafetensorError", "UnpicklingError", "BadZipFile") or name.startswith("StrictDataclass")


def _message(error: Exception, code: int) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if code == INTERNAL:
        return f"{type(error).__name__}: {text}. This is a fault of spiel-peft; --debug shows where"
    return text


def _report(output: Output, message: str, kind: str, code: int) -> int:
    output.error(message, kind, code)
    return code


def run() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of characters that the terminal's encoding lacks
    sys.exit(main())


if __name__ == "__main__":
    run()
