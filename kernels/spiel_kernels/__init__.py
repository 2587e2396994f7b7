"""Tensor operations of sparse fine-tuning: pure functions on tensors that know nothing of PEFT.

Positions are row-major flat indices into a matrix (or a higher-dimensional weight, whose rows are its first
dimension). An index set is a one-dimensional tensor of positions, sorted and without repeats.
"""

from . import folder_name as _folder_name
from .fold import (
    adapted_entries,
    apply_deltas,
    copy_fold,
    deltas_between,
    read_entries,
    sum_entries,
    union_positions,
    write_entries,
)
from .gather import (
    gather_conv,
    gather_conv_sets,
    gather_dense,
    gather_embedding,
    gather_embedding_sets,
    gather_outer,
    gather_outer_sets,
)
from .index_set import check_index_set, index_dtype, sample_positions, sorted_order
from .matrix_kind import MatrixKind
from .momentum import sm3_accumulate_, top_outer_positions, top_outer_positions_padded
from .select import Largest, largest_outer, topk_conv, topk_dense, topk_embedding, topk_outer
from .streaming import StreamingTopK, stable_topk
from .warming import warm_up

# Before the packages that look for `kernels` are imported: spiel_peft and the benchmarks import this package first.
_folder_name.hide_folder()

__all__ = [
    "Largest",
    "MatrixKind",
    "StreamingTopK",
    "adapted_entries",
    "apply_deltas",
    "check_index_set",
    "copy_fold",
    "deltas_between",
    "gather_conv",
    "gather_conv_sets",
    "gather_dense",
    "gather_embedding",
    "gather_embedding_sets",
    "gather_outer",
    "gather_outer_sets",
    "index_dtype",
    "largest_outer",
    "read_entries",
    "sample_positions",
    "sm3_accumulate_",
    "sorted_order",
    "stable_topk",
    "sum_entries",
    "top_outer_positions",
    "top_outer_positions_padded",
    "topk_conv",
    "topk_dense",
    "topk_embedding",
    "topk_outer",
    "union_positions",
    "warm_up",
    "write_entries",
]
