"""Triton kernels without a GPU: run these tests with TRITON_INTERPRET=1 set before Triton is imported.

`make test` does so in a pytest process of its own, as the variable holds for a whole process. On a GPU the same tests
run the compiled kernels (marker `gpu`).
"""

from __future__ import annotations

import os

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark these tests as GPU tests on a GPU; deselect them without a GPU and without the interpreter."""
    here = [item for item in items if "test_kernels/triton" in str(item.path).replace(os.sep, "/")]
    if torch.cuda.is_available():
        for item in here:
            item.add_marker(pytest.mark.gpu)
        return
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    config.hook.pytest_deselected(items=here)
    items[:] = [item for item in items if item not in here]


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
