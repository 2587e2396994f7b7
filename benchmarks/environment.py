"""Result files: where they are kept, how they are written and read, and how they describe their machine."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "peft", "transformers", "accelerate", "bitsandbytes", "triton")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache  # some benchmarks save often
def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def describe(device: str | torch.device | None = None) -> dict[str, Any]:
    """Describe the machine and the software of a measurement: date, commit, device, threads, versions.

    Args:
        device: where the measurement ran; by default the GPU if there is one.
    """
    on_gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def rounded(value: Any) -> Any:
    """Round every float in a JSON value to six significant digits; clocks are no more exact."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    return value


def _to_text(result: dict[str, Any]) -> str:
    """Format a result as JSON, with each list of numbers on one line."""
    text = json.dumps(result, indent=1)
    return re.sub(r"\[[-+.,\deE\s]+\]", lambda match: f"[{' '.join(match[0][1:-1].split())}]", text) + "\n"


def save(name: str, result: dict[str, Any], folder: Path = RESULTS, device: str | None = None) -> Path:
    """Write a result and the description of its machine to ``folder/name.json``; returns the path.

    The file appears at once, complete: a process that reads it meanwhile gets the old result or the new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    unfinished = folder / f".{name}.part"
    unfinished.write_text(_to_text(describe(device) | rounded(result)))
    unfinished.replace(path)
    return path


def load(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """Read the result of this name; None if there is no such file."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def load_all(prefix: str, folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Read all results whose names begin with a prefix; returns them by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob(f"{prefix}*.json"))}


def failure(error: Exception) -> str:
    """Type and message of an error, at most 500 characters, as results keep them."""
    return f"{type(error).__name__}: {error}"[:500]


def two_sizes(text: str) -> tuple[int, int]:
    """Read a command-line value such as ``4x128``."""
    first, second = (int(part) for part in text.split("x"))
    return first, second


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--output``, the folder of the result files."""
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files")
