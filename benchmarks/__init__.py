"""Measurements of speed, memory and quality: ``python -m benchmarks --help``."""

import importlib.util
import logging
import sys
from pathlib import Path

if importlib.util.find_spec("spiel_kernels") is None:
    # The checkout is not installed.
    sys.path.append(str(Path(__file__).parent.parent / "kernels"))

import spiel_kernels  # noqa: F401, E402  before all packages that look for a package named kernels

# bitsandbytes asks for the package kernels on each import on a CPU with AVX512-BF16; no benchmark uses what is in it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)
