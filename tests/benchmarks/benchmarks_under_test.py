"""Imports the benchmarks' modules for their tests.

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
    from benchmarks import (
        __main__,
        bases,
        environment,
        gpu,
        index_sets,
        layer,
        ledger,
        memory,
        ops,
        overlap,
        peft_metamathqa,
        plan,
        pretend_gpu,
        profile,
        quality,
        report,
        scaling,
        step,
        stepping,
        tables,
        timing,
        variants,
    )
    from benchmarks.gpu import checks, kernel_times, measurements, running, worker
    from benchmarks.gpu import table as gpu_table
    from benchmarks.ops import cost_models, registry
    from benchmarks.ops import measure as ops_measure
    from benchmarks.quality import cell, corpora, methods, queue, tasks, tiny_lm, training
    from benchmarks.quality import plan as quality_plan
    from benchmarks.quality import report as quality_report
    from benchmarks.report import page, plots
finally:
    sys.path.remove(str(ROOT))

__all__ = [
    "ROOT",
    "__main__",
    "bases",
    "cell",
    "checks",
    "corpora",
    "environment",
    "cost_models",
    "gpu",
    "gpu_table",
    "index_sets",
    "kernel_times",
    "layer",
    "ledger",
    "measurements",
    "memory",
    "methods",
    "ops",
    "ops_measure",
    "overlap",
    "page",
    "peft_metamathqa",
    "plan",
    "plots",
    "pretend_gpu",
    "profile",
    "quality",
    "quality_plan",
    "quality_report",
    "queue",
    "registry",
    "report",
    "running",
    "scaling",
    "step",
    "stepping",
    "tables",
    "tasks",
    "timing",
    "tiny_lm",
    "training",
    "variants",
    "worker",
]
