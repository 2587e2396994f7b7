"""These tests need Triton's interpreter: a pytest process with TRITON_INTERPRET=1, as `make test` runs one."""

from __future__ import annotations

import os

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests of a GPU's path where Triton's interpreter does not run."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    here = [item for item in items if item.path.name in ("test_counts.py", "test_doubts.py")]
    config.hook.pytest_deselected(items=here)
    items[:] = [item for item in items if item not in here]
