"""Writers and readers of the converted formats that are independent of this project."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from support.models import logits
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def loaded(base: nn.Module, folder: Path) -> Tensor:
    """Outputs of a base model with a converted adapter."""
    return logits(PeftModel.from_pretrained(base, folder))


def column_major(dense: Tensor) -> dict[str, Any]:
    """A difference as composable-sft writes it: gaps between positions counted down the columns."""
    flat = dense.numpy().flatten(order="F")
    positions = np.flatnonzero(flat)
    steps: list[Any] = np.diff(positions).tolist()
    if len(positions):
        steps = [positions[0], *steps]  # the first stays a numpy number, as in files of the library
    return {"size": dense.shape, "index_steps": steps, "values": torch.tensor(flat[positions])}


def sparse_like(tensor: Tensor, share: float = 0.2, seed: int = 0) -> Tensor:
    """A dense tensor of a weight's shape that is zero but for some entries."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(tensor.shape, generator=generator) < share
    return torch.randn(tensor.shape, generator=generator) * kept


def in_plain_peft(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a Python that cannot import this package."""
    block = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('spiel_peft', 'spiel_kernels'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", block + script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=120)
