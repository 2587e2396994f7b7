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
