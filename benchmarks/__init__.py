"""Measurements of speed, memory and quality: ``python -m benchmarks --help``."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("spiel_kernels") is None:
    # The checkout is not installed.
    sys.path.append(str(Path(__file__).parent.parent / "kernels"))
