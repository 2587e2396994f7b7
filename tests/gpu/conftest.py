"""Which GPU tests tell most: they run first, and `pytest -m "gpu and telling"` runs no others."""

from __future__ import annotations

import re

import pytest

# Beginnings of the names of tests, the most telling first. Together they launch every kernel, in the formats and dtypes
# that fine-tuning of large models uses, in about a minute.
TELLING = (
    r"test_cuda\.py::test_training_picks_the_same_positions\[AdamW-accumulated_gradient\]",
    r"test_cuda\.py::test_training_picks_the_same_positions\[SM3-momentum\]",
    r"test_quantized_cuda\.py::test_4bit_equals_pytorch\[torch\.bfloat16-nf4-True-\(4096, 11008\)\]",
    r"test_quantized_cuda\.py::test_4bit_layers_of_bitsandbytes\[torch\.bfloat16-nf4-double\]",
    r"test_cuda\.py::test_four_bit_base_trains",
    r"test_outer_cuda\.py::test_gather\[clustered-2048-1024-4096-.*-torch\.bfloat16\]",
    r"test_select_cuda\.py::test_exact\[0\.01-512-4096-4096-torch\.bfloat16\]",
    r"test_select_cuda\.py::test_ties\[200000\]",
    r"test_select_cuda\.py::test_zeros_and_nan_are_never_chosen",
    r"test_momentum_cuda\.py::test_accumulators_equal_those_of_the_cpu\[700-900-0\.01-torch\.float32-triton\]",
    r"test_momentum_cuda\.py::test_growth_equals_the_dense_formula\[700-900-0\.01-spread\]",
    r"test_runs_cuda\.py::test_the_base_weight_is_as_it_was\[accumulated_gradient-torch\.bfloat16\]",
    r"test_runs_cuda\.py::test_in_place_gives_the_same\[torch\.bfloat16\]",
    r"test_runs_cuda\.py::test_two_runs_are_equal_bit_for_bit",
    r"test_runs_cuda\.py::test_kernels_and_pytorch_train_alike",
    r"test_quantized_cuda\.py::test_8bit_equals_pytorch\[torch\.bfloat16-\(4096, 11008\)\]",
    r"test_quantized_cuda\.py::test_8bit_layers_of_bitsandbytes",
    r"test_cuda\.py::test_forward_and_backward\[.*dtype1-",
    r"test_outer_cuda\.py::test_equal_runs_give_equal_bits\[compact\]",
    r"test_outer_cuda\.py::test_planning_waits_once_and_gathering_never\[auto-1\]",
    r"test_quantized_cuda\.py::test_peak_memory_is_the_workspace",
    r"test_quantized_cuda\.py::test_workspaces_of_streams_are_apart",
    r"test_quantized_cuda\.py::test_backward_reads_the_right_weight_again",
    r"test_optimizers_cuda\.py::test_the_same_state_as_on_the_cpu\[adamw-fused\]",
    r"test_optimizers_cuda\.py::test_quantized_state\[AdamW8bit-4396\]",
    r"test_warm_up_cuda\.py::test_a_run_compiles_nothing_more\[accumulated_gradient-torch\.bfloat16\]",
    r"test_outer_cuda\.py::test_compiled_graphs_hold_the_gather\[compact\]",
)
_PATTERNS = [re.compile(r"(^|/)tests/gpu/" + pattern) for pattern in TELLING]


def rank(nodeid: str) -> int:
    """Place of a test in the list; those that are not in it come last."""
    return next((place for place, pattern in enumerate(_PATTERNS) if pattern.match(nodeid)), len(_PATTERNS))


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # All tests of a session are given to this function; those of other folders keep their places.
    places = [place for place, item in enumerate(items) if item.get_closest_marker("gpu")]
    ordered = sorted((items[place] for place in places), key=lambda item: rank(item.nodeid))
    for place, item in zip(places, ordered, strict=True):
        items[place] = item
        if rank(item.nodeid) < len(_PATTERNS):
            item.add_marker("telling")
