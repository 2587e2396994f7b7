"""Adapters of other methods and libraries turned into SpIEL adapters, and SpIEL adapters into what others read."""

from .from_composable_sft import convert_composable_sft, convert_sft_fork
from .from_peft import convert_supertuning
from .front import KINDS, convert_adapter, detect_kind
from .result import Conversion
from .shira import convert_shira, export_shira
from .to_patches import SparsePatch, export_dense_diff, export_sparse_patch, read_sparse_patches, sparse_patches

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
