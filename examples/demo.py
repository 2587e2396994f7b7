#!/usr/bin/env python
"""The demo: fine-tune SmolLM2-135M-Instruct on question-answer pairs, with two commands of `spiel-peft`.

It writes the English pairs of chatterbot-corpus to a file, prints the commands and runs them: less than five minutes on
two CPU cores. The pairs teach how to answer, in a few words instead of an essay; 50 steps teach no new facts.
Further options go to the first command:

    python examples/demo.py --growth momentum --max-steps 100
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from spiel_peft.finetune.base_model import demo_model
from spiel_peft.finetune.data import demo_pairs

# From the held-out pairs, so the model was not trained on them.
QUESTIONS = (
    "When did the Cold War end?",
    "can a robot get drunk?",
    "Robots are stupid",
    "What is your favorite book?",
    "Nice to meet you.",
)


def write_pairs(path: Path) -> None:
    """Write the pairs to a file that `spiel-peft train` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"question": pair.question, "answer": pair.answer} for pair in demo_pairs().examples]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def pairs_file(folder: Path) -> Path:
    """The file of pairs. It is beside the run's folder: a run refuses to write into a folder that holds its data."""
    return folder.with_name(f"{folder.name}-pairs.jsonl")


def commands(folder: Path, more: list[str]) -> list[list[str]]:
    """The arguments of both commands; `more` options come last, so they override the others."""
    train = ["train", "--model", demo_model().path, "--data", str(pairs_file(folder)), "--output-dir", str(folder)]
    train += ["--max-steps", "50", "--max-length", "128", "--regrow-every", "10", "--eval-every", "25", "--overwrite"]
    train += [part for question in QUESTIONS for part in ("--ask", question)]
    plot = ["plot", f"{folder}/adapter", "--base", f"{folder}/merged", "--out", f"{folder}/plots", "--overwrite"]
    return [[*train, "--merge", *more], plot]


def spiel_peft(command: list[str]) -> int:
    """Run `spiel-peft` with these arguments; returns its exit code."""
    return subprocess.call([Path(sys.executable).with_name("spiel-peft"), *command])


def main(argv: list[str] | None = None, folder: Path = Path("outputs/demo")) -> int:
    """Run the commands until one fails; returns the exit code of the last one."""
    write_pairs(pairs_file(folder))
    for command in commands(folder, sys.argv[1:] if argv is None else argv):
        print(f"\n$ {shlex.join(['spiel-peft', *command])}", flush=True)
        code = spiel_peft(command)
        if code:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
