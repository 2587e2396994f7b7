"""Data-parallel training: ranks see different gradients and still hold the same indices, values and state."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cycle.helpers import adamw, adapt, deltas_of, log_of, loss_of, trainable

STEPS, RANKS = 7, 2
GROWTHS = ["accumulated_gradient", "momentum", "random"]


def end_of_run(rank: int, growth: str) -> dict[str, torch.Tensor]:
    """Train on this rank's own data; everything that must not differ between ranks."""
    model = adapt(growth=growth, total_steps=20, initial_regrow_rate=0.8)
    parallel = DistributedDataParallel(model)
    optimizer = adamw(model)
    for number in range(1, STEPS + 1):
        loss_of(parallel, 100 * rank + number).backward()
        torch.nn.utils.clip_grad_norm_(trainable(model), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    out = {"replaced": torch.tensor([report.replaced for report in log_of(model)])}
    for name, delta in deltas_of(model).items():
        state = {key: value for key, value in optimizer.state[delta.values].items() if key != "step"}
        tensors = {"indices": delta.indices, "values": delta.values.detach(), **state}
        out |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    return out


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.save({growth: end_of_run(rank, growth) for growth in GROWTHS}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What every rank ends with. A process of its own forks them: one that has run autograd must not fork."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, __file__, str(folder)], check=True, env=environment)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("growth", GROWTHS)
def test_ranks_stay_identical(ends: list[dict[str, dict[str, torch.Tensor]]], growth: str) -> None:
    first, second = (end[growth] for end in ends)
    assert first.keys() == second.keys()
    assert (first["replaced"] > 0).all()
    for key in first:
        assert torch.equal(first[key], second[key]), key


if __name__ == "__main__":
    torch.multiprocessing.start_processes(run_rank, (sys.argv[1],), nprocs=RANKS, start_method="fork")
