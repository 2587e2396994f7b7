"""What a GPU would be given to do, seen without one.

Triton's compiler and its interpreter exclude each other in a process: with TRITON_INTERPRET=1, as `make test` sets it
in a process of its own, the interpreter's tests run, and the compiler's without it.
"""

from __future__ import annotations

import os

import pytest

COMPILER = {"test_compiled.py", "test_warm_up.py"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that cannot run in this process."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    here = [item for item in items if item.path.parent.name == "gpu_path"]
    out = [item for item in here if (item.path.name in COMPILER) == interpreting]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
