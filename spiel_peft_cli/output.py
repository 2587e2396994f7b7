"""The output of commands: a result on stdout, as text or as JSON; progress, warnings and errors on stderr."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console

Progress = Callable[[int, int, str], None]
# Columns of a table that goes to a file or another program.
WIDTH = 160
# Categories of characters that could steer a terminal or hide what a line says: control and format characters, halves
# of surrogate pairs (undecodable bytes of file names), and separators of lines and paragraphs.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def visible(text: str, keep: str = "") -> str:
    """The text with each character that could steer a terminal written as an escape: names are data of others.

    Args:
        text: what is to be printed.
        keep: characters to leave as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(c) if c not in keep and unicodedata.category(c) in _UNSAFE else c for c in text)


def _escape(character: str) -> str:
    """The escape of one character, as JSON has it."""
    code = ord(character)
    if code <= 0xFFFF:
        return f"\\u{code:04x}"
    high, low = divmod(code - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"


class _SafeConsole(Console):
    """A console that prints strings, those in tables too, as `visible` makes them."""

    def render_str(self, text: str, **options: Any) -> Any:
        """Turn a string into text with styles."""
        return super().render_str(visible(text), **options)


class Output:
    """Prints the output of one command.

    Args:
        as_json: print one JSON object on stdout and nothing else there.
        debug: print all warnings, with the place where they were raised, and tracebacks.
    """

    def __init__(self, as_json: bool = False, debug: bool = False) -> None:
        self.as_json = as_json
        self.debug = debug
        self.warnings: list[str] = []
        self.stdout = _SafeConsole(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else WIDTH)
        self.stderr = _SafeConsole(stderr=True, soft_wrap=True, highlight=False)

    def result(self, data: Mapping[str, Any], show: Callable[[Console], None]) -> None:
        """Print a command's result: `data` as JSON, or what `show` prints."""
        if not self.as_json:
            show(self.stdout)
            return
        found = {**data, **({"warnings": self.warnings} if self.warnings else {})}
        _print_json(found, indent=2)

    def warn(self, message: str) -> None:
        """Print a warning as one line on stderr; the same message only once."""
        line = " ".join(message.split())
        if line not in self.warnings:
            self.warnings.append(line)
            self.stderr.print(f"warning: {line}", markup=False, style="yellow")

    def error(self, message: str, kind: str, code: int) -> None:
        """Print an error as one line on stderr, or as a JSON object with the field "error" on stdout."""
        line = " ".join(message.split())
        if self.as_json:
            _print_json({"error": {"type": kind, "message": line, "exit_code": code}})
        else:
            self.stderr.print(f"error: {line}", markup=False, style="bold red")

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress | None]:
        """Show a bar on stderr while the block runs; yields the function that moves it.

        Without a terminal only a line is printed at the end, and with JSON nothing.
        """
        if self.as_json and not self.stderr.is_terminal:
            yield None
            return
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        what_column = TextColumn("{task.fields[what]}", style="dim", markup=False)
        bar = Bar(*columns, what_column, console=self.stderr)
        task = bar.add_task(title, total=None, what="")

        def report(done: int, total: int, what: str) -> None:
            bar.start()  # only once there is progress: errors in the input come before it
            bar.update(task, completed=done, total=total, what=visible(what))

        try:
            yield report
            bar.update(task, what="")
        finally:
            if bar.live.is_started:  # else it would print an empty line
                bar.stop()

    @contextmanager
    def in_charge(self) -> Iterator[None]:
        """While the block runs, print warnings and log messages of libraries as `warn` does, and hide their bars."""
        # Set before the libraries are imported, which read these variables then.
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
        added = [name for name in quiet if name not in os.environ]
        os.environ.update({name: quiet[name] for name in added})
        handler = _LogLines(self)
        loggers = [logging.getLogger(name) for name in ("spiel_peft", "spiel_kernels", "trl")]
        for logger in loggers:
            logger.addHandler(handler)
        bitsandbytes = logging.getLogger("bitsandbytes")
        level = bitsandbytes.level
        with warnings.catch_warnings():
            if not self.debug:
                bitsandbytes.setLevel(logging.ERROR)
                for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                    warnings.simplefilter("ignore", category)
                warnings.showwarning = lambda message, *_: self.warn(str(message))
            try:
                yield
            finally:
                for name in added:
                    os.environ.pop(name, None)
                bitsandbytes.setLevel(level)
                for logger in loggers:
                    logger.removeHandler(handler)
                sys.stdout.flush()


class _LogLines(logging.Handler):
    """Passes log messages on to `Output.warn`."""

    def __init__(self, output: Output) -> None:
        super().__init__(logging.WARNING)
        self.output = output

    def emit(self, record: logging.LogRecord) -> None:
        self.output.warn(record.getMessage())


def _print_json(value: Mapping[str, Any], indent: int | None = None) -> None:
    print(visible(json.dumps(_plain(value), indent=indent, ensure_ascii=False), keep="\n"))


def _plain(value: Any) -> Any:
    """The value in types that JSON has; numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(entry) for entry in value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
