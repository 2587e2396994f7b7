"""A script for the tests: trainings that are killed at random moments and resumed from their last checkpoint.

One process imports everything and never runs autograd, so that it can fork a child per attempt. Each child resumes
from the last whole checkpoint it finds, writes one every few steps, and says after each step how far it is. The parent
sends SIGKILL a random moment after it has heard of a random step, a few times; the last child may finish.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from support.adapters import trainable
from support.runs import everything
from transformers import Trainer, TrainerCallback

from resume.helpers import STEPS, Run
from resume.llama import llama_trainer, sft_trainer

KILLS = 3
CHECKPOINT_EVERY = 2
LAST_KILL = STEPS - 5
Tell = Callable[[int], Any]


# --- the trainings: each resumes, trains to the end with checkpoints in `folder`, and returns its final state ---


def plain_loop(folder: Path, tell: Tell, **settings: Any) -> dict[str, torch.Tensor]:
    run, file = Run(**settings), folder / "checkpoint.pt"
    done = 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    for step in range(done + 1, STEPS + 1):
        run.train(step, step)
        tell(step)
        if step % CHECKPOINT_EVERY == 0:
            new = folder / "new.pt"
            torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "step": step}, new)
            os.replace(new, file)
    return run.everything()


def accelerate_loop(folder: Path, tell: Tell) -> dict[str, torch.Tensor]:
    run = Run(micro_batches=2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(run.model, run.optimizer)
    done = [int(path.name.removeprefix("step-")) for path in folder.glob("step-*")]
    if done:
        accelerator.load_state(folder / f"step-{max(done)}")
    for step in range(max(done, default=0) + 1, STEPS + 1):
        for number in range(2):
            with accelerator.accumulate(model):
                accelerator.backward(run.loss(step, number))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trainable(model), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        tell(step)
        if step % CHECKPOINT_EVERY == 0:
            new = folder / f"new-{step}-{os.getpid()}"
            accelerator.save_state(new)
            os.replace(new, folder / f"step-{step}")
    return everything(run.model, run.optimizer)


def huggingface(make: Callable[..., Trainer], folder: Path, tell: Tell, **settings: Any) -> dict[str, torch.Tensor]:
    class Progress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            tell(state.global_step)

    trainer = make(folder, callbacks=[Progress()], save_strategy="steps", save_steps=CHECKPOINT_EVERY, **settings)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    return everything(trainer.model, trainer.optimizer)


def last_whole_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that is complete; Trainer writes trainer_state.json last."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.partition("-")[2])):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        except (OSError, ValueError):
            continue
    return None


TRAININGS: dict[str, Callable[[Path, Tell], dict[str, torch.Tensor]]] = {
    "plain": plain_loop,
    "plain_sm3_momentum": lambda folder, tell: plain_loop(folder, tell, optimizer="sm3", growth="momentum"),
    "plain_8bit_micro_batches": lambda folder, tell: plain_loop(folder, tell, optimizer="adamw_8bit", micro_batches=2),
    "accelerate": accelerate_loop,
    "trainer": lambda folder, tell: huggingface(llama_trainer, folder, tell, gradient_accumulation_steps=2),
    "trainer_sgd": lambda folder, tell: huggingface(
        llama_trainer, folder, tell, optim="sgd", optim_args="momentum=0.9", growth="momentum"
    ),
    "sft": lambda folder, tell: huggingface(sft_trainer, folder, tell),
}


# --- the parent ---


def fork(kind: str, folder: Path, end: Path) -> tuple[int, int]:
    """Start a child; returns its process id and a file descriptor to which it writes one byte per step."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    status = 1
    try:
        os.close(reader)
        torch.save(TRAININGS[kind](folder, lambda step: os.write(writer, bytes([step]))), end)
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(kind: str, folder: Path, end: Path) -> None:
    pid, reader = fork(kind, folder, end)
    status = os.waitpid(pid, 0)[1]
    os.close(reader)
    if status:
        sys.exit(f"{kind}: a training that was not killed has failed")


def kill_one(kind: str, folder: Path, step: int, delay_s: float) -> int:
    """Kill a child some time after it reports `step`; returns the last step that it finished."""
    pid, reader = fork(kind, folder, folder / "end.pt")
    told = [0]
    while told[-1] < step:
        told += os.read(reader, 1) or [STEPS]
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status):
        sys.exit(f"{kind}: ended by itself, with status {status}, before it could be killed after step {step}")
    told += os.read(reader, 256)
    os.close(reader)
    return told[-1]


def kill_and_resume(kind: str, folder: Path, chance: random.Random) -> None:
    """Write to `folder` the ends ``whole.pt`` and ``killed.pt``, and ``kills.json``: the steps before the kills."""
    for name in ("whole", "killed"):
        (folder / name).mkdir(parents=True)
    finish(kind, folder / "whole", folder / "whole.pt")
    kills: list[int] = []
    for _ in range(KILLS):
        first = min(max(kills, default=0) + 1, LAST_KILL)
        step = chance.randint(first, min(first + 3, LAST_KILL))
        kills.append(kill_one(kind, folder / "killed", step, chance.uniform(0, 0.01)))
    finish(kind, folder / "killed", folder / "killed.pt")
    (folder / "kills.json").write_text(json.dumps(kills))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in TRAININGS:
        kill_and_resume(kind, Path(sys.argv[1]) / kind, random.Random(sys.argv[2] + kind))
