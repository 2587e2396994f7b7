"""Imports what records and compiles launches from the benchmarks.

The checkout is on the import path for these imports only: to other packages its folder kernels/ would look like the
package of that name.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Imported first, and so without the checkout on the path.
import peft  # noqa: F401

import spiel_peft  # noqa: F401

ROOT = Path(__file__).parents[2]

sys.path.insert(0, str(ROOT))
try:
    from benchmarks.gpu import compiled, launches, machine_code
finally:
    sys.path.remove(str(ROOT))

__all__ = ["compiled", "launches", "machine_code"]
