"""Tests with the oldest and with the newest versions of the dependencies; needs `pip install nox uv`.

    nox -s oldest                                 everything in pyproject.toml at its lower bound
    TORCH=2.13.0 nox -s oldest                    the same with this version of torch
    nox -s oldest -- tests/adapters tests/cycle   some of the tests

What passes with the oldest versions is what pyproject.toml promises.
"""

from __future__ import annotations

import os

import nox

nox.options.default_venv_backend = "uv"
nox.options.sessions = ["oldest"]

# What depends on other packages: adapters in PEFT's and transformers' models, trainers, files, the command line.
TESTS = ["adapters", "cli", "config", "cycle", "files", "layers", "model", "trainers"]


def _test(session: nox.Session, resolution: str) -> None:
    torch = f"torch=={os.environ['TORCH']}" if "TORCH" in os.environ else "torch"
    session.run_install(
        "uv", "pip", "install", "--resolution", resolution, "--editable", ".[test,plot,demo]", torch, external=True
    )
    session.run("uv", "pip", "list", external=True)
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    session.run("pytest", "-q", *(session.posargs or [f"tests/{folder}" for folder in TESTS]), env=environment)


@nox.session
def oldest(session: nox.Session) -> None:
    """Every dependency at the lower bound that pyproject.toml gives, or the lowest that fits the others."""
    _test(session, "lowest-direct")


@nox.session
def newest(session: nox.Session) -> None:
    """Every dependency as new as it can be."""
    _test(session, "highest")
