"""Settings that all tests share."""

from __future__ import annotations

import os

# Before transformers is imported: nothing here may depend on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, alone or after others."""
    torch.manual_seed(0)
