"""What the two parts of the GPU benchmark measure, the most important first, and for how long.

The seconds of a part include those in which its worker starts, about ten. With the start of the supervising process and
the grace of a measurement that hangs, part one ends in less than four minutes, and part two in less than five.
"""

from __future__ import annotations

from ..stepping import LORA
from . import operations, training
from .checks import gpu_tests
from .running import Measurement, Part

AG, MA = "SpIEL-AG", "SpIEL-MA, SM3"

ONE = Part(
    "one",
    215.0,
    (
        Measurement("tests_telling", 60, gpu_tests("gpu and telling")),
        Measurement("machine", 6, operations.machine),
        Measurement("fold_nf4", 12, operations.fold_nf4),
        Measurement("in_place", 15, operations.in_place),
        Measurement("compile", 22, training.compile_kernels),
        Measurement("whole_7b_nf4_qlora", 27, training.whole("7b_nf4", LORA)),
        Measurement("whole_7b_nf4_ag", 32, training.whole("7b_nf4", AG)),
        Measurement("whole_7b_nf4_ma", 30, training.whole("7b_nf4", MA)),
    ),
)
TWO = Part(
    "two",
    275.0,
    (
        Measurement("steps_7b_nf4", 40, training.steps_7b_nf4),
        Measurement("gather", 35, operations.gather),
        Measurement("tests_other", 45, gpu_tests("gpu and not telling")),
        Measurement("steps_7b_bf16", 30, training.steps_7b_bf16),
        Measurement("growth", 14, operations.growth),
        Measurement("share", 24, training.share),
        Measurement("whole_7b_bf16_lora", 14, training.whole("7b_bf16", LORA)),
        Measurement("whole_7b_bf16_ag", 14, training.whole("7b_bf16", AG)),
        Measurement("whole_7b_bf16_ma", 14, training.whole("7b_bf16", MA)),
        Measurement("other_folds", 8, operations.other_folds),
        Measurement("single_precision", 6, operations.single_precision),
        Measurement("steps_13b_nf4", 15, training.steps_13b_nf4),
        Measurement("one_layer", 6, training.one_layer),
    ),
)
PARTS = {part.name: part for part in (ONE, TWO)}
