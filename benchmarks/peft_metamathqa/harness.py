"""The harness of PEFT's benchmark: how experiments get into its folder and run there, and what it says of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..tables import markdown

METHOD = "spiel"
EXPERIMENTS = Path(__file__).parent / "experiments" / METHOD
SETTINGS = "default_training_params.json"  # of every experiment that does not say otherwise
FILES = ("run.py", "utils.py", "data.py", SETTINGS)
# Results that come with the harness: LoRA with as many trained values as each of ours, and SHiRA.
COMPARED = ("lora--llama-3.2-3B-rank32.json", "lora--llama-3.2-3B-rank10-target-mlp.json", "shira--*.json")

Result = dict[str, Any]


def names() -> list[str]:
    """The names of all experiments."""
    return sorted(path.name for path in EXPERIMENTS.iterdir())


@dataclass(frozen=True)
class Harness:
    """The folder ``method_comparison/MetaMathQA`` of a checkout of PEFT, or a copy of it.

    Args:
        folder: absolute path.
        environment: variables that its processes get in addition.
        preparation: Python code that its processes run before the harness.
    """

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    preparation: str = ""

    @classmethod
    def at(cls, folder: Path) -> Harness:
        """The harness in this folder; its processes take the PEFT of the same checkout.

        Raises:
            ValueError: this is not the harness, or its runs have another length than the experiments say.
        """
        folder = folder.resolve()
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"--harness must be the folder method_comparison/MetaMathQA of a checkout of PEFT, got {folder}, "
                f"which has no {', '.join(missing)}"
            )
        steps = json.loads((folder / SETTINGS).read_text())["max_steps"]
        for name in names():
            config = EXPERIMENTS / name / "adapter_config.json"
            if json.loads(config.read_text())["total_steps"] != steps:
                raise ValueError(f"total_steps must be {steps}, as max_steps in {folder / SETTINGS}: change {config}")
        source = folder.parents[1] / "src"
        if not (source / "peft" / "__init__.py").is_file():
            return cls(folder)
        paths = [str(source), os.environ.get("PYTHONPATH")]
        return cls(folder, {"PYTHONPATH": os.pathsep.join(path for path in paths if path)})

    def place(self, names: Iterable[str]) -> None:
        """Copy experiments to where the harness looks for them.

        Raises:
            ValueError: a file with other content is there. Then nothing was written.
        """
        sources = [path for name in names for path in sorted((EXPERIMENTS / name).iterdir())]
        files = {self.folder / "experiments" / METHOD / path.relative_to(EXPERIMENTS): path for path in sources}
        for target, source in files.items():
            if target.exists() and target.read_bytes() != source.read_bytes():
                raise ValueError(f"{target} must not have other content than {source}: move it away")
        for target, source in files.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())

    def run(self, name: str) -> bool:
        """Run an experiment in a process that imports this package first. Returns whether it has a new result.

        The harness ends with a message and no error where training fails, for want of memory or by another exception.
        """
        before = self.result(name)
        lines = ["import runpy, spiel_peft", self.preparation, "runpy.run_path('run.py', run_name='__main__')"]
        command = [sys.executable, "-c", "\n".join(lines), "-v", os.path.join("experiments", METHOD, name)]
        done = subprocess.run(command, cwd=self.folder, env=os.environ | self.environment, check=False)
        return done.returncode == 0 and self.result(name) != before

    def result(self, name: str) -> Result | None:
        """The newest result of an experiment that went to its end.

        The harness writes it to ``results`` if PEFT's checkout is on the branch main, else to ``temporary_results``.
        """
        stem = f"{METHOD}--{name}"
        paths = [self.folder / "results" / f"{stem}.json", *(self.folder / "temporary_results").glob(f"{stem}--*.json")]
        found = [json.loads(path.read_text()) for path in paths if path.is_file()]
        ended = [result for result in found if result["train_info"]["status"] == "success"]
        return max(ended, key=lambda result: result["run_info"]["created_at"], default=None)

    def compared(self) -> list[Result]:
        """The results of LoRA and SHiRA that are there."""
        paths = [path for pattern in COMPARED for path in sorted((self.folder / "results").glob(pattern))]
        return [json.loads(path.read_text()) for path in paths]


def table(results: Iterable[Result]) -> str:
    """Table of results in the harness's format, one line for each."""
    header = ["experiment", "rate", "trained values", "test accuracy", "forgetting", "training loss", "minutes"]
    return markdown([*header, "peak GiB", "file MiB", "device"], [_row(result) for result in results])


def _row(result: Result) -> list[str]:
    run, training = result["run_info"], result["train_info"]
    last = training["metrics"][-1]  # of the test set
    return [
        run["experiment_name"],
        f"{run['train_config']['optimizer_kwargs']['lr']:g}",
        f"{training['num_trainable_params']:,}",
        f"{last['test accuracy']:.3f}",
        f"{last['forgetting']:.3f}",
        f"{last['train loss']:.3f}",
        f"{training['train_time'] / 60:.1f}",
        f"{training['accelerator_memory_max'] / 2**30:.1f}",
        f"{training['file_size'] / 2**20:.1f}",
        result["meta_info"]["system_info"]["accelerator"],
    ]
