"""A training that is killed at random steps and resumed from its last checkpoint ends as one without interruption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.runs import assert_same

from . import killed
from .helpers import STEPS

SCRIPT = Path(killed.__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which every kind of training ran twice: without interruption, and killed and resumed."""
    folder = tmp_path_factory.mktemp("killed")
    paths = [str(SCRIPT.parents[1]), *(path for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, str(SCRIPT), str(folder), "seed"], check=True, env=environment)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", killed.TRAININGS)
def test_a_killed_training_ends_as_one_that_was_not(folder: Path, kind: str) -> None:
    kills = json.loads((folder / kind / "kills.json").read_text())
    assert len(kills) == killed.KILLS and max(kills) < STEPS
    whole, resumed = (torch.load(folder / kind / f"{name}.pt", weights_only=True) for name in ("whole", "killed"))
    assert sum(key.endswith(".indices") for key in whole) >= 2
    assert_same(whole, resumed)
