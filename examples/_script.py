"""How the scripts start and end."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import transformers

from _data import InputError


def run_script(name: str, work: Callable[[], object], *also: type[Exception]) -> int:
    """Does a script's work; its exit status: 0, or 2 after one line on stderr for an InputError, or one of `also`."""
    transformers.logging.set_verbosity_error()
    # PEFT's own use of names that transformers is about to rename; nothing to act on here.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        work()
    except (InputError, *also) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    return 0
