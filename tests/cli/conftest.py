"""Folders that are made once, and a copy of them for each test."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from .helpers import Shell, make_folders


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    make_folders(folder)
    return folder


@pytest.fixture
def folders(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test, with all folders in it."""
    here = tmp_path / "here"
    shutil.copytree(made, here)
    monkeypatch.chdir(here)
    monkeypatch.setitem(os.environ, "COLUMNS", "200")
    return here


@pytest.fixture
def shell(folders: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)
