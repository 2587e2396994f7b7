"""SpIEL sparse fine-tuning as a PEFT method: put `SpIELConfig` where `LoraConfig` was.

Importing this package makes peft_type "SPIEL" known to PEFT.
"""

import spiel_kernels as _spiel_kernels  # noqa: F401  first: see folder_name.py there

from . import card as _card
from .callback import SpIELCallback
from .compose.active import KeepActive, LanguageCycler, LanguageCyclerCallback, activate
from .compose.combine import combine_adapters
from .compose.overlap import Overlap, OverlapReport, overlap, overlap_of_files
from .config import SpIELConfig
from .convert import (
    Conversion,
    SparsePatch,
    convert_adapter,
    export_dense_diff,
    export_shira,
    export_sparse_patch,
    read_sparse_patches,
    sparse_patches,
)
from .cycle import engine as _engine
from .cycle.close import CycleReport
from .cycle.parallel import set_data_parallel_group
from .delta import SparseDelta
from .files.extract import Extraction, extract_delta
from .files.loading import guard_loaders as _guard_loaders
from .files.merge import merge_adapter_into_checkpoint
from .growth import GrowthCriterion, GrowthRequest, PruneRequest, get_growth_criterion, register_growth_criterion
from .inspection import AdapterFacts, Finding, adapter_facts, validate_adapter
from .layers import SpIELConv, SpIELEmbedding, SpIELLayer, SpIELLinear, SpIELParameter, SpIELParameters
from .layers.kinds import warm_up
from .model import SpIELModel
from .optimizers import SM3, SpIELOptimizer
from .registration import register_classes as _register_classes
from .saving import check_header as _check_header
from .weights.merge_report import MergeLoss, MergeReport

__version__ = "0.1.0"

__all__ = [
    "SM3",
    "AdapterFacts",
    "Conversion",
    "CycleReport",
    "Extraction",
    "Finding",
    "GrowthCriterion",
    "GrowthRequest",
    "KeepActive",
    "LanguageCycler",
    "LanguageCyclerCallback",
    "MergeLoss",
    "MergeReport",
    "Overlap",
    "OverlapReport",
    "PruneRequest",
    "SpIELCallback",
    "SpIELConfig",
    "SpIELConv",
    "SpIELEmbedding",
    "SpIELLayer",
    "SpIELLinear",
    "SpIELModel",
    "SpIELOptimizer",
    "SpIELParameter",
    "SpIELParameters",
    "SparseDelta",
    "SparsePatch",
    "activate",
    "adapter_facts",
    "combine_adapters",
    "convert_adapter",
    "export_dense_diff",
    "export_shira",
    "export_sparse_patch",
    "extract_delta",
    "get_growth_criterion",
    "merge_adapter_into_checkpoint",
    "overlap",
    "overlap_of_files",
    "read_sparse_patches",
    "register",
    "register_growth_criterion",
    "set_data_parallel_group",
    "sparse_patches",
    "validate_adapter",
    "warm_up",
]


def register() -> None:
    """Make peft_type "SPIEL" known to PEFT. Safe to call any number of times and from several threads.

    Raises:
        RuntimeError: another package has registered its own "SPIEL" or the prefix "spiel_".
    """
    _register_classes(SpIELConfig, SpIELModel)


register()
_guard_loaders(_check_header)
_engine.install()
_card.install()
