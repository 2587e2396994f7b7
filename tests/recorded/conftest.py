"""Fixtures: one thread, and whether this machine computes the same bits as the one that recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .models import DATA, machine, one_thread


@pytest.fixture(autouse=True)
def single_threaded() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def recorded_runs() -> dict[str, Any]:
    return json.loads((DATA / "runs.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def same_arithmetic(recorded_runs: dict[str, Any]) -> bool:
    """Whether results must be equal bit for bit.

    Matrix products and activations differ in their last bits between CPUs and between versions of PyTorch. Where they
    do, results are compared with a tolerance; what is only read, added and rounded is compared bit for bit anywhere.
    """
    with one_thread():
        return machine() == recorded_runs["machine"]
