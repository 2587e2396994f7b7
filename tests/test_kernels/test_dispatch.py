"""The choice of an implementation: by device, or an explicit one, which must work or raise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from spiel_kernels import dispatch
from spiel_kernels.dispatch import runs_triton, use_backend


def test_cpu_tensors_run_in_pytorch() -> None:
    assert not runs_triton(torch.ones(1))
    with use_backend("torch"):
        assert not runs_triton(torch.ones(1))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton, got 'cuda'"), use_backend("cuda"):
        pass


def test_an_explicit_choice_must_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"):
        monkeypatch.setattr(dispatch, "triton_installed", lambda: True)
        with pytest.raises(RuntimeError, match="'triton' was chosen, but the tensors are on cpu"):
            runs_triton(torch.ones(1))
        monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
        with pytest.raises(RuntimeError, match="the package triton is not installed"):
            runs_triton(torch.ones(1))
        monkeypatch.setattr(dispatch, "triton_installed", lambda: True)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert runs_triton(torch.ones(1))
    assert not runs_triton(torch.ones(1))


def test_choices_nest_and_end_with_an_error() -> None:
    with use_backend("torch"):
        with pytest.raises(KeyError), use_backend("auto"):
            raise KeyError
        assert dispatch._forced == "torch"
    assert dispatch._forced is None


def test_the_environment_is_checked() -> None:
    command = "import torch; from spiel_kernels.dispatch import runs_triton; runs_triton(torch.ones(1))"
    environment = {
        **os.environ,
        "SPIEL_KERNELS": "fast",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "SPIEL_KERNELS must be one of auto, torch, triton, got 'fast'" in done.stderr


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="PyTorch does not know the tag yet")
def test_operators_that_write_in_place_stay_out_of_cuda_graphs() -> None:
    import spiel_kernels.quantized  # noqa: F401  registers its operators
    import spiel_peft.autograd.compiled  # noqa: F401

    unsafe = torch.Tag.cudagraph_unsafe
    ops, own = torch.ops.spiel_kernels, torch.ops.spiel_peft
    in_place = [ops.copy_fold, ops.dequantize_fold_4bit, ops.dequantize_fold_8bit, ops.sm3_accumulate_]
    decide = [own.adapted, own.adapted_grad_input, own.adapted_grad_values]
    assert all(unsafe in op.default.tags for op in [*in_place, *decide])
    assert unsafe not in ops.topk_outer.default.tags
    names = [name for name in torch._C._dispatch_get_registrations_for_dispatch_key("CompositeExplicitAutograd")]
    ours = [name.removeprefix("spiel_kernels::") for name in names if name.startswith("spiel_kernels::")]
    for name in ours:
        overload = getattr(ops, name).default
        assert ("!)" in str(overload._schema)) == (unsafe in overload.tags), name


SETTINGS = {
    "nothing": ("pass", False),
    "legacy": ("torch.backends.cuda.matmul.allow_tf32 = True", True),
    "matmul precision": ("torch.set_float32_matmul_precision('high')", True),
}
if hasattr(torch.backends, "fp32_precision"):
    SETTINGS |= {
        "all backends": ("torch.backends.fp32_precision = 'tf32'", True),
        "products": ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
        "all but products": (
            "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'",
            False,
        ),
    }


@pytest.mark.parametrize("setting", SETTINGS)
def test_tf32_is_read_however_it_was_set(setting: str) -> None:
    """In a process each, as PyTorch refuses to mix its settings."""
    statement, expected = SETTINGS[setting]
    program = f"import torch; from spiel_kernels.dispatch import tf32_allowed; {statement}; print(tf32_allowed())"
    got = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert got.stdout.strip() == str(expected)
