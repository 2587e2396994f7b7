"""Trainers on two ranks without callback: casts, added adapters and wrappers are the same on all ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.runs import assert_equal, snapshot
from peft import PeftModel
from support.adapters import deltas_of, log_of
from support.models import load_quantized, save_llama, tiny_llama
from support.ranks import launch, results_of, run_here
from support.text import sentences
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainers.helpers import adapted, config
from trainers.test_lightning import Module, lightning_trainer
from trainers.trl_runs import KINDS

# Starting the processes takes longer than the trainings.
pytestmark = pytest.mark.slow
RANKS, STEPS = 2, 7


def positions_and_values(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, delta in deltas_of(model, adapter).items():
        tensors |= {f"{name}.indices": delta.indices.clone(), f"{name}.values": delta.values.detach().clone()}
    return tensors


def outcome(model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> dict[str, Any]:
    return {
        "snapshot": snapshot(model, optimizer),
        "dtypes": {delta.values.dtype for delta in deltas_of(model).values()},
        "closes": [report.step for report in log_of(model)],
        "replaced": sum(report.replaced for report in log_of(model)[1:]),
        **more,
    }


def by_trl(rank: int, name: str, base: Callable[[], nn.Module], **settings: Any) -> dict[str, Any]:
    folder = Path(sys.argv[1])
    model = base()
    peft_config = None if isinstance(model, PeftModel) else config(task_type=KINDS[name].task)
    trainer = KINDS[name].build(model, folder / name, peft_config, max_steps=STEPS, **settings)
    cast = {delta.values.dtype for delta in deltas_of(trainer.model).values()}
    start = positions_and_values(trainer.model, "default")
    trainer.train()
    return outcome(
        trainer.model,
        trainer.optimizer.optimizer,
        wrapped=type(trainer.model_wrapped).__name__,
        cast=cast,
        start=start,
        reference=positions_and_values(trainer.model, "ref"),
    )


def quantized() -> nn.Module:
    return load_quantized(Path(sys.argv[1]) / "quantized")


def first_stage() -> PeftModel:
    """A trained adapter; saved by the process that starts the ranks."""
    return PeftModel.from_pretrained(tiny_llama(), Path(sys.argv[1]) / "first", is_trainable=True)


def by_lightning(rank: int) -> dict[str, Any]:
    # What torchrun sets as well, and Lightning looks for; the process group is there already.
    os.environ |= {"TORCHELASTIC_RUN_ID": "run", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    model = adapted()
    trainer = lightning_trainer(Path(sys.argv[1]), devices=RANKS, strategy="ddp", max_steps=STEPS, max_epochs=-1)
    trainer.fit(Module(model), DataLoader(torch.tensor(sentences()), batch_size=4))
    return outcome(model, trainer.optimizers[0], world_size=trainer.world_size)


SCENARIOS = {
    "SFT on 4 bits": partial(by_trl, name="SFT", base=quantized),
    "DPO": partial(by_trl, name="DPO", base=first_stage),
    "GRPO": partial(by_trl, name="GRPO", base=first_stage, beta=0.1),
    "Lightning": by_lightning,
}


def check(name: str, by_rank: list[dict[str, Any]]) -> None:
    assert_equal(result["snapshot"] for result in by_rank)
    for result in by_rank:
        assert result["closes"] == [2, 6], name
        assert result["replaced"] > 0, name
        assert result["dtypes"] == {torch.float32}, name
        assert result.get("wrapped", "DistributedDataParallel") == "DistributedDataParallel", name
        assert result.get("world_size", RANKS) == RANKS, name


# One test, not one for each: test processes that share these would start the ranks once each.
def test_all_ranks_end_with_the_same_run(tmp_path: Path) -> None:
    save_llama(tmp_path / "quantized")
    model = adapted()
    for delta in deltas_of(model).values():
        delta.values.data.normal_(std=0.05)
    model.save_pretrained(tmp_path / "first")
    launched = launch(__file__, tmp_path, RANKS)
    results = {name: results_of(launched, name) for name in SCENARIOS}
    for name, by_rank in results.items():
        check(name, by_rank)
    # The cast is undone before the model is wrapped: the wrapper lays out what it sums by the dtypes that it finds.
    assert [result["cast"] for result in results["SFT on 4 bits"]] == [{torch.bfloat16}] * RANKS
    # The reference adapter is the same on all ranks, and stays.
    for result in (*results["DPO"], *results["GRPO"]):
        assert_equal([result["start"], result["reference"]])
        assert result["reference"]


if __name__ == "__main__":
    run_here(SCENARIOS, RANKS)
