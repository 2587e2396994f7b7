"""Adapters of other methods and libraries turned into SpIEL adapters, and SpIEL adapters into what others read."""

from .composable_sft import convert_composable_sft
from .dense_diff import export_dense_diff
from .front import KINDS, convert_adapter, detect_kind
from .result import Conversion
from .sft_fork import convert_sft_fork
from .shira import convert_shira, export_shira
from .sparse_patch import SparsePatch, export_sparse_patch, read_sparse_patches, sparse_patches
from .supertuning import convert_supertuning

__all__ = [
    "KINDS",
    "Conversion",
    "SparsePatch",
    "convert_adapter",
    "convert_composable_sft",
    "convert_sft_fork",
    "convert_shira",
    "convert_supertuning",
    "detect_kind",
    "export_dense_diff",
    "export_shira",
    "export_sparse_patch",
    "read_sparse_patches",
    "sparse_patches",
]
