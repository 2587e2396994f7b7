"""DeepSpeed: stage 0 in float32 works after the ranks are declared; everything else is refused.

DeepSpeed is no dependency of the tests (it compiles operators as it is imported): where it is missing, a stand-in for
its engine is looked at.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.adapters import deltas_of
from support.ranks import Raised, launch, results_of, run_here
from support.runs import adamw, adapt, loss_of
from torch import Tensor, nn

from distributed.runs import FIELDS, assert_lockstep, own_batch, snapshot
from spiel_peft import set_data_parallel_group

RANKS, STEPS = 2, 8
INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason="deepspeed is not installed")


def by_deepspeed(rank: int, stage: int, chosen: bool = False, half: bool = False) -> list[dict[str, Tensor]]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # A communication operator for CPUs that would have to be compiled.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    model = adapt(**FIELDS)
    optimizer = adamw(model)
    if chosen:
        set_data_parallel_group(model, dist.group.WORLD)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 12,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": half},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    out = []
    for number in range(1, STEPS + 1):
        x, y = own_batch(rank, number)
        engine.backward((engine(x.bfloat16() if half else x) - y).square().mean())
        engine.step()
        out.append(snapshot(model, optimizer))
    return out


REFUSED = {
    "stage 0": (partial(by_deepspeed, stage=0), "call spiel_peft.set_data_parallel_group"),
    "stage 0, bfloat16": (partial(by_deepspeed, stage=0, chosen=True, half=True), "ZeRO stage 0 with FP16_Unfused"),
    "stage 1": (partial(by_deepspeed, stage=1), "ZeRO stage 1 with DeepSpeedZeroOptimizer"),
    "stage 2": (partial(by_deepspeed, stage=2, chosen=True), "ZeRO stage 2 with DeepSpeedZeroOptimizer"),
    "stage 3": (partial(by_deepspeed, stage=3), "ZeRO stage 3, which splits the deltas themselves"),
}
SCENARIOS: dict[str, Any] = {
    "stage 0, chosen": partial(by_deepspeed, stage=0, chosen=True),
    **{name: scenario for name, (scenario, _) in REFUSED.items()},
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return launch(__file__, tmp_path_factory.mktemp("deepspeed"), RANKS)


@needs_deepspeed
def test_ranks_are_identical_once_they_are_named(launched: dict[str, list[Any]]) -> None:
    by_rank = results_of(launched, "stage 0, chosen")
    assert_lockstep(by_rank)
    assert (by_rank[0][-1]["replaced"] > 0).all()


@needs_deepspeed
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_what_deepspeed_makes_of_it(launched: dict[str, list[Any]], name: str) -> None:
    for raised in launched[name]:
        assert isinstance(raised, Raised)
        assert REFUSED[name][1] in raised.message


# A stand-in


class Engine(nn.Module):
    """A stand-in for DeepSpeedEngine: a module around the model, an optimizer and a stage."""

    def __init__(self, model: nn.Module, optimizer: Any, stage: int) -> None:
        super().__init__()
        self.model, self.optimizer, self.stage = model, optimizer, stage

    def zero_optimization_stage(self) -> int:
        return self.stage


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("deepspeed.runtime.engine")
    module.DeepSpeedEngine = Engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.engine", module)


class FlatOptimizer:
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        flat = torch.cat([p.detach().view(-1) for p in parameters])
        self.param_groups = [{"params": [flat]}]


def test_flat_buffers_are_refused_before_anything_changes(pretended: None) -> None:
    model = adapt(**FIELDS)
    before = {name: (d.indices.clone(), d.values.clone()) for name, d in deltas_of(model).items()}
    engine = Engine(model, FlatOptimizer([d.values for d in deltas_of(model).values()]), stage=2)
    with pytest.raises(RuntimeError, match="ZeRO stage 2 with FlatOptimizer, which keeps .*: use FSDP2"):
        loss_of(engine.model, 1).backward()
    for name, delta in deltas_of(model).items():
        assert torch.equal(delta.indices, before[name][0])
        assert torch.equal(delta.values, before[name][1])
        assert delta.values.grad is None


def test_plain_optimizers_need_to_know_the_ranks(pretended: None) -> None:
    model = adapt(**FIELDS)
    engine = Engine(model, adamw(model), stage=0)
    with pytest.raises(RuntimeError, match="ZeRO stage 0.*set_data_parallel_group"):
        loss_of(engine.model, 1).backward()
    set_data_parallel_group(model, None)
    loss_of(engine.model, 1).backward()
    assert all(delta.values.grad is not None for delta in deltas_of(model).values())


def test_engines_of_other_models_do_not_matter(pretended: None) -> None:
    engine = Engine(nn.Linear(2, 2), None, stage=3)
    model = adapt(**FIELDS)
    loss_of(model, 1).backward()
    assert engine.stage == 3
    assert all(delta.values.grad is not None for delta in deltas_of(model).values())


def test_split_deltas_are_refused_in_the_forward_pass() -> None:
    model = adapt(**FIELDS)
    deltas_of(model)["2"].values.ds_id = 7
    with pytest.raises(RuntimeError, match="ZeRO stage 3, which splits the deltas themselves: use FSDP2"):
        loss_of(model, 1)


if __name__ == "__main__":
    run_here(SCENARIOS, RANKS)
