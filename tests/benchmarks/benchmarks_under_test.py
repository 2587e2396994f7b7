"""The benchmarks' modules for their tests.

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
        alone,
        bases,
        cost_model,
        demo_task,
        dense_formula,
        environment,
        floors,
        gather_rates,
        gpu,
        gpu_table,
        gpu_training,
        index_sets,
        layer,
        op_cases,
        op_registry,
        ops,
        overlap,
        page,
        parts,
        plots,
        profile,
        quality,
        report,
        scaling,
        step,
        stepping,
        tables,
        targets,
        timing,
        variants,
        windows,
    )
    from benchmarks.quality import cell, corpora, methods, queue, tasks, tiny_lm, training
    from benchmarks.quality import plan as quality_plan
    from benchmarks.quality import report as quality_report
finally:
    sys.path.remove(str(ROOT))

__all__ = [
    "alone",
    "ROOT",
    "__main__",
    "bases",
    "cell",
    "corpora",
    "cost_model",
    "demo_task",
    "dense_formula",
    "environment",
    "floors",
    "gather_rates",
    "gpu",
    "gpu_table",
    "gpu_training",
    "index_sets",
    "layer",
    "methods",
    "op_cases",
    "op_registry",
    "ops",
    "overlap",
    "page",
    "parts",
    "plots",
    "profile",
    "quality",
    "quality_plan",
    "quality_report",
    "queue",
    "report",
    "scaling",
    "step",
    "stepping",
    "tables",
    "targets",
    "tasks",
    "timing",
    "tiny_lm",
    "training",
    "variants",
    "windows",
]
