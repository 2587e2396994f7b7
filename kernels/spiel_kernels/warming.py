"""Compiles kernels ahead of the training that needs them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .dispatch import interpreting, triton_installed
from .matrix_kind import MatrixKind


def warm_up(kinds: Iterable[MatrixKind], device: torch.device | str) -> int:
    """Compile the Triton kernels that training matrices of these kinds launches, without running them.

    Otherwise each is compiled when it is launched first, some of them in the first window and close.

    Args:
        kinds: of the matrices; `spiel_peft.warm_up` finds them out for a model.
        device: of the training. Without Triton, or on another device than a CUDA GPU, there is nothing to compile.

    Returns:
        How many kernels are ready.
    """
    device = torch.device(device)
    if device.type != "cuda" or interpreting() or not triton_installed():
        return 0
    from .triton_backend.compile_ahead import compile_ahead

    with torch.cuda.device(device):
        return compile_ahead(kinds)
