"""What a result must say of where it was measured, and where it is kept."""

from __future__ import annotations

import argparse
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
    """Date, commit, device and versions.

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
    """The same JSON value with six significant digits per float: clocks do not give more."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    return value


def _to_text(result: dict[str, Any]) -> str:
    """JSON with lists of numbers on one line each."""
    text = json.dumps(result, indent=1)
    return re.sub(r"\[[-+.,\deE\s]+\]", lambda match: f"[{' '.join(match[0][1:-1].split())}]", text) + "\n"


def save(name: str, result: dict[str, Any], folder: Path = RESULTS, device: str | None = None) -> Path:
    """Write a result beside its description; returns the path. A reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    unfinished = folder / f".{name}.part"
    unfinished.write_text(_to_text(describe(device) | rounded(result)))
    unfinished.replace(path)
    return path


def load(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """A result by name, or None if it has not been measured."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def load_all(prefix: str, folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """All results whose names begin with a prefix, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob(f"{prefix}*.json"))}


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files")
