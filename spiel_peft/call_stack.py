"""Whether somebody else's function is running: for what other libraries do without telling."""

from __future__ import annotations

import sys
from types import FrameType


def is_running(module: str, function: str, depth: int) -> bool:
    """Whether a function is on the call stack of this thread.

    Args:
        module: full name of the module that defines it.
        function: its name.
        depth: how many callers are looked at.
    """
    if module not in sys.modules:
        return False
    frame: FrameType | None = sys._getframe(1)
    for _ in range(depth):
        if frame is None:
            return False
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back
    return False
