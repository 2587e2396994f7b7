"""Puts the folder examples/ on the import path, so that tests can import the scripts in it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
